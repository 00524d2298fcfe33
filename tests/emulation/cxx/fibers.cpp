// CUDA on the CPU: the threads of a block as fibers, their barriers and warp operations, and the launch.
#include "fibers.h"

#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

__thread Here here;

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kTokens = 4096;
constexpr int64_t kSharedBytes = 227 * 1024;
constexpr uint32_t kPoison = 0x7fff7fff;  // NaN in fp16, bf16, fp32 and fp64

enum class State { ready, at_barrier, at_warp_op, exited };

struct Fiber {
  Context context;
  State state;
  Op op;
  const char* site;
  unsigned mask;
  int source;
  uint64_t value, result;
  char* token;  // of the barrier or warp operation it waits at; one address for each, for the order that TSan sees
};

struct Launch {
  void (*kernel)(void**);
  void** args;
  int64_t grid, shared;
  int threads, workers;
  uint64_t seed;
  std::ptrdiff_t local_start, local_bytes;  // thread-local storage, as an offset from `here`
  std::atomic<bool> failed{false};
  std::string error;
};

int nth_bit(uint32_t bits, unsigned n) {
  for (; n; --n) bits &= bits - 1;
  return __builtin_ctz(bits);
}

// "csrc/cuda/small.cuh:40#3", of which the last part tells two barriers of one line apart.
std::string place(const char* site) { return std::string(site, strcspn(site, "#")); }

// "0-15 18-19 ..."
std::string ranges(const std::vector<int>& numbers) {
  std::string all;
  for (size_t i = 0, last, shown = 0; i < numbers.size(); i = last + 1) {
    for (last = i; last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1;) ++last;
    if (++shown > 4) return all + " ...";
    all += (i ? " " : "") + std::to_string(numbers[i]) + (last > i ? "-" + std::to_string(numbers[last]) : "");
  }
  return all;
}

bool same_site(const char* a, const char* b) { return a == b || !strcmp(a, b); }

}  // namespace

struct Worker {
  Launch* launch;
  Context scheduler;
  Fiber fibers[kThreads];
  int prepared = 0, current, alive, waiting_at_barrier;
  uint32_t ready[kWarps], at_warp_op[kWarps], ready_warps;  // a bit per lane, a bit per warp
  uint64_t random;
  unsigned token = 0;
  char *stacks = nullptr, *barrier_token, tokens[kTokens], started, ended;

  ~Worker() { reset(); }
  void reset();
  void prepare_fibers(int threads);
  unsigned draw(unsigned below);
  char* fresh_token() { return &tokens[token++ % kTokens]; }
  void make_ready(int thread);
  int pick();
  void pass_barrier();
  void pass_warp_op(unsigned mask, int first);
  void park();
  void run_block(int64_t block);
  void poison() const;
  std::string describe() const;
  [[noreturn]] void fail(const std::string& why);
};

namespace {

void entry() {
  for (Worker& w = *here.worker;;) {  // the next block has the same fibers
    acquire(&w.started);
    w.launch->kernel(w.launch->args);
    release(&w.ended);
    w.fibers[w.current].state = State::exited;
    --w.alive;
    w.park();
  }
}

}  // namespace

void Worker::reset() {
  for (int i = 0; i < prepared; ++i) forget(fibers[i].context);
  if (stacks) munmap(stacks, prepared * kStack);
  stacks = nullptr;
  prepared = 0;
}

void Worker::prepare_fibers(int threads) {
  if (threads <= prepared) return;
  reset();
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  stacks = static_cast<char*>(mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
  for (int i = 0; i < threads; ++i) prepare(fibers[i].context, stacks + i * kStack, entry, i % 32 * 128);
  prepared = threads;
}

unsigned Worker::draw(unsigned below) {
  random ^= random << 13, random ^= random >> 7, random ^= random << 17;
  return (random >> 32) % below;
}

void Worker::make_ready(int thread) {
  fibers[thread].state = State::ready;
  ready[thread / 32] |= 1u << thread % 32;
  ready_warps |= 1u << thread / 32;
}

// Who goes on, no longer ready then; -1: nobody. Unless shuffled, the lanes of a warp go on together, which is faster.
int Worker::pick() {
  if (!ready_warps) return -1;
  const bool shuffled = launch->seed;
  int warp = current / 32;
  if (shuffled) warp = nth_bit(ready_warps, draw(__builtin_popcount(ready_warps)));
  else if (!ready[warp]) warp = __builtin_ctz(ready_warps);
  const int lane = nth_bit(ready[warp], shuffled ? draw(__builtin_popcount(ready[warp])) : 0);
  if (!(ready[warp] &= ~(1u << lane))) ready_warps &= ~(1u << warp);
  return warp * 32 + lane;
}

// Until the current fiber is picked again: perhaps, in a later launch, by another OS thread. Inlined into `entry`, it
// could be given the address of `here` that the first one had.
__attribute__((noinline)) void Worker::park() {
  Fiber& self = fibers[current];
  int next;
  while ((next = pick()) < 0 && alive) {
    if (waiting_at_barrier != alive) fail("deadlock: threads wait for others, which wait elsewhere or have exited");
    pass_barrier();
  }
  if (next == current) return;
  if (next >= 0) here.thread.x = current = next;
  switch_to(self.context, next < 0 ? scheduler : fibers[next].context);
}

void Worker::pass_barrier() {
  const Fiber* first = nullptr;
  int count = 0;
  for (int i = 0; i < launch->threads; ++i) {
    const Fiber& f = fibers[i];
    if (f.state == State::exited) continue;
    if (!first) first = &f;
    if (!same_site(f.site, first->site)) fail("divergent barrier: threads are at different __syncthreads");
    count += f.value != 0;
  }
  const int results[] = {0, count > 0, count == alive, count};
  for (int i = 0; i < launch->threads; ++i) {
    if (fibers[i].state == State::exited) continue;
    fibers[i].result = results[static_cast<int>(first->op)];
    make_ready(i);
  }
  waiting_at_barrier = 0;
  barrier_token = fresh_token();
}

void Worker::pass_warp_op(unsigned mask, int first) {
  Fiber* lanes = &fibers[first];
  const Fiber& one = lanes[__builtin_ctz(mask)];
  uint64_t votes = 0;
  for (unsigned left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    const Fiber& f = lanes[lane];
    if (f.mask != mask || !same_site(f.site, one.site)) fail("lanes of one mask are at different warp operations");
    votes |= static_cast<uint64_t>(f.value != 0) << lane;
  }
  at_warp_op[first / 32] &= ~mask;
  for (unsigned left = mask; left; left &= left - 1) {
    Fiber& f = lanes[__builtin_ctz(left)];
    f.result = f.op == Op::shuffle ? lanes[f.source].value : votes;
    make_ready(static_cast<int>(&f - fibers));
  }
}

int sync_block(const char* site, Op op, int predicate) {
  Worker& w = *here.worker;
  Fiber& self = w.fibers[w.current];
  self.state = State::at_barrier;
  self.site = site;
  self.op = op;
  self.value = predicate;
  self.token = w.barrier_token;
  ++w.waiting_at_barrier;
  release(self.token);
  w.park();
  acquire(self.token);
  return static_cast<int>(self.result);
}

uint64_t sync_warp(const char* site, Op op, unsigned mask, uint64_t value, int source) {
  Worker& w = *here.worker;
  Fiber& self = w.fibers[w.current];
  const int first = w.current & ~31, lane = w.current & 31;
  self.state = State::at_warp_op;
  self.site = site;
  self.op = op;
  self.mask = mask;
  self.value = value;
  self.source = source;
  if (!(mask >> lane & 1)) w.fail("a mask without the lane that gives it: lane " + std::to_string(lane));
  if (op == Op::shuffle && !(mask >> source & 1))
    w.fail("lane " + std::to_string(lane) + " reads lane " + std::to_string(source) + ", which is not in the mask");
  uint32_t& there = w.at_warp_op[first / 32];
  self.token = there & mask ? w.fibers[first + __builtin_ctz(there & mask)].token : w.fresh_token();
  there |= 1u << lane;
  if (op == Op::syncwarp) release(self.token);
  if ((there & mask) == mask) w.pass_warp_op(mask, first);
  w.park();
  if (op == Op::syncwarp) acquire(self.token);
  return self.result;
}

// All fences are one after the other, and what is before one is before the next.
void fence() {
  static char order;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  acquire(&order);
  release(&order);
}

void yield() {
  Worker& w = *here.worker;
  if (w.launch->failed) w.fail("");
  if (!w.launch->seed || w.draw(2)) return;
  w.make_ready(w.current);
  w.park();
}

// "32 threads (0-15 18-19 ...) at kernel.cuh:12, mask 0000ffff; ..."
std::string Worker::describe() const {
  const auto status = [this](int i) {
    const Fiber& f = fibers[i];
    if (f.state == State::exited) return std::string("exited");
    if (f.state == State::ready) return std::string("not there yet");
    char mask[32] = "";
    if (f.state == State::at_warp_op) snprintf(mask, sizeof mask, ", mask %08x", f.mask);
    return "at " + place(f.site) + mask;
  };
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < launch->threads; ++i) groups[status(i)].push_back(i);
  std::string all;
  for (const auto& [where, threads] : groups)
    all += (all.empty() ? "" : "; ") + std::to_string(threads.size()) + " threads (" + ranges(threads) + ") " + where;
  return all;
}

// Ends the launch: the fibers, which stay where they are, are given up.
void Worker::fail(const std::string& why) {
  if (!launch->failed.exchange(true))
    launch->error = why + ", in block " + std::to_string(here.block.x) + " (" + describe() + ")";
  for (int i = 0; i < launch->threads; ++i) release_as(fibers[i].context, &ended);
  Context given_up;
  switch_to(given_up, scheduler);
  abort();
}

// The dynamic shared memory is fresh anyhow; here, whatever is declared __shared__.
void Worker::poison() const {
  char* const start = reinterpret_cast<char*>(&here) + launch->local_start;
  const Here saved = here;
  for (std::ptrdiff_t i = 0; i + 4 <= launch->local_bytes; i += 4) memcpy(start + i, &kPoison, 4);
  here = saved;
}

void Worker::run_block(int64_t block) {
  const std::unique_ptr<char[]> shared(new char[launch->shared]);  // ends where it ends: ASan sees who goes further
  for (int64_t i = 0; i < launch->shared; ++i) shared[i] = reinterpret_cast<const char*>(&kPoison)[i % 4];
  poison();
  const auto threads = static_cast<unsigned>(launch->threads), blocks = static_cast<unsigned>(launch->grid);
  here = {{0, 0, 0}, {static_cast<unsigned>(block), 0, 0}, {threads, 1, 1}, {blocks, 1, 1}, shared.get(), this};
  random = launch->seed * 0x9E3779B97F4A7C15 + block + 1;
  alive = launch->threads;
  waiting_at_barrier = 0;
  barrier_token = fresh_token();
  ready_warps = 0;
  memset(ready, 0, sizeof ready);
  memset(at_warp_op, 0, sizeof at_warp_op);
  for (int i = 0; i < launch->threads; ++i) make_ready(i);
  release(&started);
  current = 0;
  here.thread.x = current = pick();
  switch_to(scheduler, fibers[current].context);
  acquire(&ended);
}

namespace {

void work(Worker& worker, Launch& launch, int64_t first) {
  here_as(worker.scheduler);
  worker.launch = &launch;
  worker.prepare_fibers(launch.threads);
  for (int64_t i = first; i < launch.grid && !launch.failed; i += launch.workers)
    worker.run_block(launch.seed ? (i * 2654435761u + launch.seed) % launch.grid : i);  // a prime above any grid
  if (launch.failed) worker.reset();
}

// Where this library has its thread-local variables, which are `here` and those declared __shared__.
int find_local(dl_phdr_info* info, size_t, void* data) {
  Launch& launch = *static_cast<Launch*>(data);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto bytes = static_cast<std::ptrdiff_t>(info->dlpi_phdr[i].p_memsz);
    const auto start = static_cast<char*>(info->dlpi_tls_data) - reinterpret_cast<char*>(&here);
    if (info->dlpi_phdr[i].p_type != PT_TLS || start > 0 || start + bytes <= 0) continue;
    launch.local_start = start;
    launch.local_bytes = bytes;
    return 1;
  }
  return 0;
}

int64_t setting(const char* name, int64_t otherwise) {
  const char* text = getenv(name);
  return text ? strtoll(text, nullptr, 10) : otherwise;
}

std::string refuse(int64_t grid, int64_t block, int64_t shared) {
  if (grid < 1 || grid > INT32_MAX) return "wanted 1 to 2^31 - 1 blocks; got " + std::to_string(grid);
  if (block < 1 || block > kThreads) return "wanted 1 to 1024 threads; got " + std::to_string(block);
  if (shared < 0 || shared > kSharedBytes)
    return "wanted at most 232448 bytes of shared memory; got " + std::to_string(shared);
  return "";
}

}  // namespace

const char* launch(void (*kernel)(void**), void** args, int64_t grid, int64_t block, int64_t shared) {
  static std::mutex one;
  static std::vector<std::unique_ptr<Worker>> kept;  // mapping stacks takes time
  static std::string error;
  const std::lock_guard<std::mutex> lock(one);
  if (!(error = refuse(grid, block, shared)).empty()) return error.c_str();
  Launch launch;
  launch.kernel = kernel;
  launch.args = args;
  launch.grid = grid;
  launch.shared = shared;
  launch.threads = static_cast<int>(block);
  launch.seed = static_cast<uint64_t>(setting("CK_EMU_SEED", 0));
  launch.workers = static_cast<int>(std::min(std::max<int64_t>(setting("CK_EMU_THREADS", 1), 1), grid));
  here.worker = nullptr;  // what is thread-local is made when it is first used
  dl_iterate_phdr(find_local, &launch);
  while (static_cast<int>(kept.size()) < launch.workers) kept.emplace_back(new Worker);
  std::vector<std::thread> others;  // nothing else is shared by them: TSan would take it for an order
  for (int i = 1; i < launch.workers; ++i) others.emplace_back(work, std::ref(*kept[i]), std::ref(launch), i);
  work(*kept[0], launch, 0);
  for (std::thread& other : others) other.join();
  return (error = launch.error).empty() ? nullptr : error.c_str();
}

}  // namespace cuda_on_cpu
