"""When ``auto`` chooses, when it keeps its choice, and when it thinks again."""

import pytest

from raytrain_het.allreduce.codecs import byte_cpu_s, codec_costs, codec_of
from raytrain_het.balance.auto_compression import ROUNDS, Compression
from raytrain_het.balance.paths import NUM_LOOKS
from raytrain_het.balance.profile import Measurement, Profile
from raytrain_het.balance.scoreboard import Scoreboard
from raytrain_het.codec_options import AUTO_CODECS, used_together
from raytrain_het.config import HetConfig

WORDS = ("none", "int8", "topk")
COSTS = {"none": [4.0, 0.0, 0.0, 0.0], "int8": [1.0, 1e-10, 1e-10, 0.006], "topk": [0.03, 3e-10, 1e-10, 0.95]}
ELEMENTS = 4_000_000
SLOW = 8e-6 / 100
FAST = 8e-6 / 100_000
STEP = {"compute_s": 0.05, "besides_s": 24e6 * SLOW}


def compression(*, slots=range(4), error=0.97):
    made = Compression(error, WORDS)
    for slot in slots:
        made.introduce(slot, {"costs": COSTS, "num_elements": ELEMENTS})
    return made


def codecs(word, slots=range(4)):
    return dict.fromkeys(slots, word)


def rounds(made, now, byte_s, count=ROUNDS, **step):
    """What it says after so many rounds."""
    links = dict.fromkeys(now, byte_s) if byte_s else {}
    speeds = dict.fromkeys(now, 1.0)
    return [made.better(now, links, speeds, **{**STEP, **step}) for _ in range(count)]


def test_slow_links_are_believed_after_some_rounds_and_get_a_codec():
    *before, choice = rounds(compression(), codecs("none"), SLOW)
    assert before == [None] * (ROUNDS - 1)
    assert choice.codecs == codecs("topk")
    assert choice.step_s < STEP["besides_s"] / 12
    assert max(choice.links_s.values()) == pytest.approx(0.03 * ELEMENTS * SLOW)
    assert "compression: a step of" in choice.reason and "MiB" in choice.reason


def test_links_that_look_slower_than_steps_are_do_not_count_for_hidden_messages():
    """More than computing there is nothing to hide behind."""
    choice = rounds(compression(), codecs("none"), 1.4 * SLOW)[-1]
    assert choice.codecs == codecs("topk")
    assert choice.step_s < STEP["compute_s"] + STEP["besides_s"] / 12


def test_nothing_is_chosen_before_links_are_known_or_of_a_worker_that_has_told_nothing():
    assert rounds(compression(), codecs("none"), 0.0, 10) == [None] * 10
    assert rounds(compression(slots=range(3)), codecs("none"), SLOW, 10) == [None] * 10


def test_fast_links_stay_uncompressed():
    assert rounds(compression(), codecs("none"), FAST, 10, besides_s=0.001) == [None] * 10


def test_a_choice_stays_as_long_as_nobody_comes():
    made = compression()
    choice = rounds(made, codecs("none"), SLOW)[-1]
    step = {"besides_s": choice.step_s - STEP["compute_s"]}
    assert rounds(made, choice.codecs, SLOW, 20, **step) == [None] * 20
    worse = {**COSTS, "topk": [0.03, 3e-10, 1e-10, 0.99]}
    made.introduce(4, {"costs": worse, "num_elements": ELEMENTS})
    assert rounds(made, codecs("topk", range(5)), SLOW, **step)[-1].codecs == codecs("int8", range(5))


def test_what_loses_more_of_real_gradients_than_is_allowed_is_given_up():
    made = compression()
    choice = rounds(made, codecs("none"), SLOW)[-1]
    step = {"besides_s": choice.step_s - STEP["compute_s"]}
    made.observe_error(2, "topk", 0.9)
    assert rounds(made, choice.codecs, SLOW, 5, **step) == [None] * 5
    made.observe_error(2, "topk", 0.99)
    assert rounds(made, choice.codecs, SLOW, **step)[-1].codecs == codecs("int8")


def test_steps_that_take_much_longer_than_was_promised_are_a_reason_to_think_again():
    made = compression()
    assert rounds(made, codecs("none"), FAST, 5, besides_s=0.001) == [None] * 5
    said = rounds(made, codecs("none"), SLOW, 10 * ROUNDS)
    assert [choice.codecs for choice in said if choice][:1] == [codecs("topk")]


def test_a_scoreboard_issues_the_choice_with_shares_and_scores_as_they_are():
    board = Scoreboard(HetConfig(shares=None), compression(slots=range(3)))
    board.global_batch_size = 12
    for slot in range(3):
        board.introduce(
            slot, Profile(hardware="x", device="cpu", cores=1, num_threads=1, flops={"fp32": Measurement(1e9, 0.0, 3)})
        )
    table = None
    for _ in range(20):
        for slot in range(3):
            others = {peer: (0.5, 0.5 * 4 * ELEMENTS * SLOW) for peer in range(3) if peer != slot}
            board.observe_paths(slot, others, 4 * ELEMENTS)
            board.observe(slot, 4, 0.05, 1.5)
        table = table or board.better(range(3), dict.fromkeys(range(3), 4))
    assert table is not None
    assert table.codecs == codecs("topk", range(3))
    assert table.shares == dict.fromkeys(range(3), 4) and set(table.gradient_weights.values()) == {1.0}
    now = dict.fromkeys(range(3), 4)
    assert board.expected_samples_per_s(now) == pytest.approx(12 / 0.05)  # What messages took before says nothing now.


def test_paths_tell_seconds_of_a_byte_whatever_a_gradient_takes():
    from raytrain_het.balance.paths import PathRates

    paths = PathRates()
    for _ in range(NUM_LOOKS):
        paths.observe(0, {1: (1.0, 2.0)}, 1000)
        paths.observe(1, {0: (1.0, 0.5)}, 250)
    assert paths.byte_s([0, 1]) == pytest.approx({0: 0.002, 1: 0.002})
    paths.observe(0, {1: (1.0, 1.0)}, 10)  # Another codec: what was seen of its messages does not count any more.
    assert paths.byte_s([0, 1]) == {}


def test_costs_are_measured_of_every_codec_that_auto_knows():
    shapes = [(300, 40, 3), (256, 256), (20, 70)]
    costs = codec_costs(((word, codec_of(word)) for word in AUTO_CODECS), cores=1, shapes=shapes)
    assert (costs["none"].num_bytes, costs["none"].encode_s, costs["none"].error) == (4.0, 0.0, 0.0), "but it is added"
    apart = {word: cost for word, cost in costs.items() if not used_together(word)}
    sizes, errors = [cost.num_bytes for cost in apart.values()], [cost.error for cost in apart.values()]
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    assert all(cost.encode_s > 0 and cost.decode_s > 0 for word, cost in apart.items() if word not in ("none", "bf16"))
    numel, wide = 36_000 + 65_536 + 1400, 16 * (300 + 120 + 256 + 256)
    assert costs["lowrank(rank=16)"].num_bytes == pytest.approx(4 * (wide + 1400) / numel), "20 x 70 travels whole"
    assert costs["lowrank"].num_bytes == pytest.approx(4 * (wide / 4 + 4 * 90) / numel)
    assert costs["lowrank(rank=16)"].error < costs["lowrank"].error < 0.85
    assert costs["lowrank"].encode_s > 0 == costs["lowrank"].decode_s
    assert costs["topk"].error < 0.97


def test_auto_adds_up_on_each_machine_where_that_is_faster_and_stays_with_it():
    made, hosts = compression(error=0.2), dict(enumerate("xxyy"))
    made.hierarchy = None
    choice = rounds(made, codecs("none"), SLOW, hosts=hosts)[-1]
    assert choice.by_machine and choice.codecs == codecs("int8") and "on each machine" in choice.reason
    step = {"besides_s": choice.step_s - STEP["compute_s"]}
    assert rounds(made, choice.codecs, SLOW, 20, hosts=hosts, by_machine=True, **step) == [None] * 20
    made.hierarchy = False
    made.introduce(3, {"costs": COSTS, "num_elements": ELEMENTS})
    assert not rounds(made, choice.codecs, SLOW, hosts=hosts, by_machine=True, **step)[-1].by_machine


def test_what_the_system_does_for_messages_counts_as_theirs_and_not_as_computing():
    """Nobody waits for a link that is as fast as memory; what is sent takes time all the same."""
    made = compression(error=0.2)
    for slot in range(4):
        made.introduce(slot, {"costs": COSTS, "num_elements": ELEMENTS, "byte_cpu_s": 1e-9})
    said = rounds(made, codecs("none"), FAST / 100, compute_s=0.1, besides_s=0.001)[-1]
    assert said.codecs == codecs("int8")
    # 24 MB in and 24 MB out, half a nanosecond for a byte; of int8 a quarter, and what encoding it takes.
    assert said.step_s == pytest.approx(0.101 - 0.024 + 0.006 + 4e6 * 2.5e-10, rel=0.02)
    assert byte_cpu_s(cores=1) < 1e-8
    assert byte_cpu_s(cores=0.1) > 2 * byte_cpu_s(cores=1)


def test_a_choice_is_made_without_a_worker_that_was_lost_whatever_scores_are_from():
    board = Scoreboard(HetConfig(score_policy="flops"), compression(slots=range(3)))
    board.global_batch_size = 12
    for slot in range(3):
        board.introduce(
            slot, Profile(hardware="x", device="cpu", cores=1, num_threads=1, flops={"fp32": Measurement(1e9, 0.0, 3)})
        )
    assert board.fitting(range(3)) is not None
    board.place({0: "x", 1: "y"}, {})
    table = None
    for _ in range(20):
        for slot in range(2):
            board.observe_paths(slot, {1 - slot: (0.5, 0.5 * 4 * ELEMENTS * SLOW)}, 4 * ELEMENTS)
            board.observe(slot, 4, 0.05, 1.5)
        table = table or board.better(range(2), dict.fromkeys(range(2), 4))
    assert table is not None and table.codecs == codecs("topk", range(2))


def test_with_leaders_their_links_are_everybodys_on_their_machines():
    board = Scoreboard(HetConfig(shares=None))
    board.place(dict(enumerate("xxyy")), {0: 0, 1: 0, 2: 2, 3: 2})
    for _ in range(NUM_LOOKS):
        for slot, peer in ((0, 2), (2, 0)):
            board.observe_paths(slot, {peer: (1.0, 0.5), slot + 1: (1.0, 0.001)}, 1000)
    assert board._of_links(board._paths.byte_s, range(4)) == pytest.approx(dict.fromkeys(range(4), 0.001))
    assert board._of_links(board._paths.links_s, range(4)) == pytest.approx(dict.fromkeys(range(4), 1.0))
