// Launches that tests/emulation/emulator.py has written down, with the memory they need, in a process that a
// sanitizer watches.
// Usage: replay IN OUT. Everything in IN is a 64-bit word or padded to words.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <new>
#include <string>
#include <vector>

#include "../../../csrc/cuda/launch.h"

namespace {

struct Reader {
  std::vector<char> file;
  size_t at = 0;

  const char* bytes(size_t count) {
    const char* start = file.data() + at;
    at += (count + 7) / 8 * 8;
    return start;
  }
  int64_t word() { return *reinterpret_cast<const int64_t*>(bytes(8)); }
};

struct Buffer {  // allocated here at its own size: whatever lies next to it is out of bounds
  int64_t recorded, size, table;
  char* data;
};

// Pointers into one copy of the buffers become pointers into the other.
void relocate(char* data, int64_t size, const std::vector<Buffer>& buffers, bool back) {
  auto* const words = reinterpret_cast<int64_t*>(data);
  for (int64_t i = 0; i < size / 8; ++i)
    for (const Buffer& b : buffers) {
      const auto here = reinterpret_cast<int64_t>(b.data), from = back ? here : b.recorded;
      if (words[i] < from || words[i] >= from + b.size) continue;
      words[i] += (back ? b.recorded : here) - from;
      break;
    }
}

std::vector<Buffer> read_buffers(Reader& in) {
  std::vector<Buffer> buffers(in.word());
  for (Buffer& b : buffers) {
    b.recorded = in.word(), b.size = in.word(), b.table = in.word();
    const char* data = in.bytes(b.size);
    b.data = static_cast<char*>(::operator new(b.size, std::align_val_t(64)));
    std::copy(data, data + b.size, b.data);
  }
  for (const Buffer& b : buffers)
    if (b.table) relocate(b.data, b.size, buffers, false);
  return buffers;
}

const char* launch_next(Reader& in, const std::vector<Buffer>& buffers) {
  const int64_t length = in.word();
  const std::string name(in.bytes(length), length);
  const int64_t grid = in.word(), block = in.word(), shared = in.word();
  std::vector<std::vector<char>> args(in.word());
  std::vector<void*> pointers;
  for (auto& arg : args) {
    const int64_t size = in.word();
    const char* data = in.bytes(size);
    arg.assign(data, data + size);
    relocate(arg.data(), size, buffers, false);
    pointers.push_back(arg.data());
  }
  return ck_launch(name.c_str(), grid, block, shared, 0, nullptr, pointers.data());
}

}  // namespace

int main(int, char** argv) {
  std::ifstream file(argv[1], std::ios::binary);
  Reader in{{std::istreambuf_iterator<char>(file), {}}};
  const std::vector<Buffer> buffers = read_buffers(in);
  for (int64_t left = in.word(); left; --left)
    if (const char* error = launch_next(in, buffers)) {
      fprintf(stderr, "%s\n", error);
      return 1;
    }
  std::ofstream out(argv[2], std::ios::binary);
  for (const Buffer& b : buffers) {
    if (b.table) relocate(b.data, b.size, buffers, true);
    out.write(b.data, b.size);
    ::operator delete(b.data, std::align_val_t(64));
  }
  return out.flush() ? 0 : 1;
}
