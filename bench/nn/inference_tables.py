"""Tables at the end of an inference benchmark. A wrong answer gets no speed-up, and is none's baseline."""

from itertools import product
from statistics import geometric_mean

from bench.nn import inference_floor
from bench.nn import inference_layers as layers
from bench.nn import inference_networks as networks
from bench.nn.inference_layers import speedup

RIVALS = (layers.DENSE, layers.TWO_STEP)
AGAINST = {"dense": (layers.DENSE,), "two-step": (layers.TWO_STEP,), "both": RIVALS, "best": layers.ROWS[:4]}
LOSES = 0.97  # of the faster of both rivals: less is more than noise
TENSORLY = "tensorly: as many weights" if layers.tltorch else "tensorly-torch is not installed: no column."

layer_results: list[tuple[layers.Case, dict[str, dict], float]] = []  # case, row by name, ms of the floor
network_results: list[tuple[str, dict[str, dict], float]] = []
planner_rows: list[
    tuple
] = []  # seed, how planned, rank, factorized, layers, seconds: as it came, channels_last, planned


def times(ratio: float | None, width: int = 9) -> str:
    return f"{ratio:.2f}x".rjust(width) if ratio else " " * width


def cell(row: dict | None, width: int) -> str:
    if row is None:
        return "".rjust(width)
    return f"{row['ms']:.3f}".rjust(width) if row["ok"] else "wrong".rjust(width)


def of_floor(row: dict, floor: float) -> str:
    return f"{row['ms'] / floor:9.1f}" if row["ok"] else " " * 9


def write_layers(write) -> None:
    write("")
    write("Layers, median ms; how many times faster ours is (below 1: slower); its error / largest output")
    write("other: NCHW; linear layers as 1 x 1 convolutions. both: the faster of dense and two-step; best: with other.")
    write(f"ours: way measured to be the fastest. {TENSORLY}")
    names = [name for name in layers.ROWS if layers.tltorch or name != layers.TENSORLY]
    head = "".join(f"{name:>16}" for name in names) + "".join(f"{'/ ' + name:>11}" for name in AGAINST)
    write(f"{'':64}{head}{'x floor':>9}{'error':>9}  way")
    for case, result, floor in layer_results:
        ours = result[layers.OURS]
        text = "".join(cell(result.get(name), 16) for name in names)
        text += "".join(times(speedup(result, others), 11) for others in AGAINST.values())
        write(f"{case!s:64}{text}{of_floor(ours, floor)}{ours['error']:9.0e}  {ours['way']}")


def write_losses(write) -> None:
    """Every layer that is slower than the faster of both rivals by more than noise; and how many there are."""
    ratios = [(speedup(result, RIVALS), case, result[layers.OURS]["way"]) for case, result, _ in layer_results]
    known = [row for row in ratios if row[0]]
    lost = sorted((row for row in known if row[0] < LOSES), key=lambda row: row[0])
    write("")
    write(f"Layers below {LOSES:.2f}x of the faster of {' and '.join(RIVALS)}: {len(lost)} of {len(known)}")
    for ratio, case, way in lost:
        write(f"{case!s:64}{times(ratio)}  {way}")


def write_means(write) -> None:
    write("")
    write("Layers, how many times faster ours is than: geometric mean (worst), and how many were slower")
    write(f"{'':36}{'cases':>6}{'wrong':>7}{''.join(f'{name:>26}' for name in AGAINST)}")
    kinds = dict.fromkeys(case.layer.kind for case, _, _ in layer_results)
    for kind, batch, share in product(kinds, layers.BATCHES, (*layers.SHARES, "all")):
        group = [
            result for case, result, _ in layer_results
            if (case.layer.kind, case.batch) == (kind, batch) and share in (case.share, "all")
        ]  # fmt: skip
        if group:
            wrong = sum(not result[layers.OURS]["ok"] for result in group)
            text = "".join(f"{mean(group, names):>26}" for names in AGAINST.values())
            write(f"{f'{kind}, batch {batch}, r = {share}':36}{len(group):6}{wrong:7}{text}")


def mean(group: list[dict], others: tuple[str, ...]) -> str:
    found = [ratio for ratio in (speedup(result, others) for result in group) if ratio]
    slower = sum(ratio < 1 for ratio in found)
    return f"{geometric_mean(found):.2f}x ({min(found):.2f}x, {slower} slower)" if found else ""


def write_networks(write) -> None:
    write("")
    write("Networks, in channels_last unless NCHW; compiled: by inductor, with freezing, and as a rival")
    write("the compiled two-step; faults: minor, per call")
    head = f"{'median ms':>11}{'dense / it':>12}{'two-step / it':>15}{'compiled / it':>15}"
    write(f"{'':44}{'':20}{head}{'x floor':>9}{'faults':>9}{'error':>9}")
    for case, result, floor in network_results:
        for name, row in result.items():
            ratios = "".join(
                times(speedup(result, (other,), name) if name != other else None, width)
                for other, width in ((networks.DENSE, 12), (networks.TWO_STEP, 15), (networks.COMPILED, 15))
            )
            floors = " " * 9 if name.startswith("dense") else of_floor(row, floor)
            text = f"{cell(row, 11)}{ratios}{floors}"
            write(f"{case:44}{name:20}{text}{row['faults']:9.0f}{row['error']:9.0e}")


def write_planner(write) -> None:
    write("")
    write("Random networks, ck.compress(goal='speed'): median ms, and dense time (as it came) over planned")
    head = f"{'dense':>10}{'in channels_last':>18}{'planned':>10}"
    write(f"{'network':>8}{'planned by':>12}{'rank':>6}{'factorized':>12}{head}")
    for seed, how, rank, some, of, dense, last, planned in planner_rows:
        ms = f"{1e3 * dense:10.3f}{1e3 * last:18.3f}{1e3 * planned:10.3f}"
        write(f"{seed:8}{how:>12}{rank:>6}{f'{some} of {of}':>12}{ms}{times(dense / planned)}")
    for how in dict.fromkeys(row[1] for row in planner_rows):
        ratios = [row[5] / row[7] for row in planner_rows if row[1] == how]
        write(f"{how}: geometric mean {geometric_mean(ratios):.2f}x, worst {min(ratios):.2f}x")


def write_all(write) -> None:
    if layer_results:
        write_layers(write)
        write_losses(write)
        write_means(write)
    if network_results:
        write_networks(write)
    if planner_rows:
        write_planner(write)
    if layer_results or network_results:
        write(inference_floor.measured())
