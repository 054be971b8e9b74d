"""Cases whose times can be computed by hand: a link of 1,000,000 bytes a second carries a megabyte in a second."""

import pytest

from lightning_overlap import ConfigError
from lightning_overlap.tune.memory import Memory
from lightning_overlap.tune.network import Link, Network, parse_link
from lightning_overlap.tune.rehearsal import Compute, Post, Rehearsal, Wait
from lightning_overlap.tune.simulate import Simulation, simulate

MB = 1_000_000
SLOW = Link(MB)


def post(number, *, megabytes=1.0, label="data.grads[0]", ranks=(0, 1), verb="reduce_scatter", background=True, nth=0):
    return Post(number, label, nth, int(megabytes * MB), ranks, verb, background)


def rank(*events, number=0, stage=0):
    return Rehearsal(number, stage, 2, events, Memory(0, 0, 0, 0, 0, 0))


def simulated(*events, link=SLOW, overlapped=True) -> Simulation:
    return simulate([rank(*events)], Network(1, None, link), overlapped=overlapped)


def test_a_transfer_is_hidden_as_far_as_compute_is_long():
    events = [Compute(1), post(0, megabytes=3), Compute(2), Wait(0)]
    hidden = simulated(*events)
    assert hidden.seconds == pytest.approx(4)
    assert hidden.exposed == pytest.approx({"data.grads": 1})
    assert hidden.exposed_by_mode() == pytest.approx({"data": 1})
    assert hidden.late == 0
    assert hidden.busy == pytest.approx(3 / 4)
    plain = simulated(*events, overlapped=False)
    assert plain.seconds == pytest.approx(6)
    assert plain.exposed == pytest.approx({"data.grads": 3})


def test_latency_is_waited_for_and_takes_no_bandwidth():
    both = [post(0, megabytes=0.5), post(1, megabytes=0.5, label="data.params[0]"), Wait(0), Wait(1)]
    assert simulated(*both, link=Link(MB, latency=0.25)).seconds == pytest.approx(1.25)
    # a ring of four passes a sum of no size on three times
    ring = [post(0, megabytes=0, ranks=(0, 1, 2, 3), verb="all_reduce"), Wait(0)]
    assert simulated(*ring, link=Link(MB, latency=0.25)).seconds == pytest.approx(0.75)


def test_a_transfer_may_be_waited_for_in_the_next_step():
    gather = post(0, label="data.params[0]", verb="all_gather", megabytes=2)
    alone = simulated(Wait(0, previous=True), Compute(1), gather)
    assert alone.seconds == pytest.approx(3)
    assert alone.exposed == pytest.approx({"data.params": 2})
    under_forward = simulated(Compute(1), Wait(0, previous=True), Compute(1), gather)
    assert under_forward.seconds == pytest.approx(3)
    assert under_forward.exposed == pytest.approx({"data.params": 1})
    assert simulated(Compute(1), Wait(0, previous=True), Compute(1), gather, overlapped=False).seconds == pytest.approx(4)


def test_a_wait_may_come_after_the_next_post():
    gather = post(0, label="data.params[0]", verb="all_gather", megabytes=3)
    # The wait after the second computation is for the post of the step before: the link carries 3 MB a step all the time.
    late = simulated(Compute(1), gather, Compute(1), Wait(0, previous=True))
    assert late.seconds == pytest.approx(3)
    assert late.exposed == pytest.approx({"data.params": 1})
    # An all-to-all takes as long as the fuller direction.
    uneven = post(0, label="expert.dispatch[0]", verb="all_to_all", megabytes=1, background=False)._replace(received=2 * MB)
    assert simulated(uneven, Wait(0)).seconds == pytest.approx(2)


def test_what_is_needed_next_goes_first():
    # Background reductions of 4 MB are under way in chunks of about half a megabyte when 1 MB of another group is posted.
    reductions = [post(0, megabytes=4), Compute(0.1)]
    foreground = post(1, label="tensor.row", background=False)
    result = simulated(*reductions, foreground, Wait(1), Compute(1), Wait(0))
    chunk = 4 / 7
    assert result.exposed["tensor.row"] == pytest.approx(chunk - 0.1 + 1)
    assert result.seconds == pytest.approx(5)
    # Gathers yield to reductions that are posted later, and go in the order in which they are waited for.
    gathers = [post(n, label=f"data.params[{n}]", verb="all_gather", megabytes=0.5) for n in (0, 1, 2)]
    late = post(3, megabytes=0.5)
    ordered = simulated(*gathers, late, Wait(3), Wait(2), Compute(10), Wait(1), Wait(0))
    assert ordered.exposed["data.grads"] == pytest.approx(1), "the gather that has begun is not stopped"
    assert ordered.exposed["data.params"] == pytest.approx(0.5), "the one that is waited for first"


def test_transfers_take_compute():
    taking = Link(MB, load=0.5, overhead=0.125)
    result = simulated(post(0, background=False), Compute(1), Wait(0), link=taking)
    # in the first second half of the work of 1.125 is done
    assert result.seconds == pytest.approx(1.625)
    assert result.exposed == {}
    # background data is posted in chunks of 524,288 bytes, here two
    assert simulated(post(0), Compute(1), Wait(0), link=taking).seconds == pytest.approx(1.75)
    # a rank that waits anyway loses nothing
    assert simulated(post(0), Wait(0), Compute(1), link=taking).seconds == pytest.approx(2)


def two_stages(**options):
    """The first stage computes 1 s and sends; the second one needs it for its 3 s, and sends back what the first needs for 1 s."""
    ahead = {"label": "pipeline.forward[0]", "ranks": (0, 1), "background": False}
    back = {"label": "pipeline.backward[0]", "ranks": (1, 0), "background": False}
    receive = {"verb": "receive", "megabytes": 0}
    first = rank(post(0, **back, **receive), Compute(1), post(1, **ahead, verb="send"), Wait(0), Compute(1), number=0)
    second = rank(post(0, **ahead, **receive), Wait(0), Compute(3), post(1, **back, verb="send"), number=1, stage=1)
    return simulate([first, second], Network(1, None, SLOW), **options)


def test_stages_wait_for_each_other():
    result = two_stages()
    assert result.seconds == pytest.approx(7), "1 of compute, 1 of transfer, 3 of compute, 1 of transfer, 1 of compute"
    # The first stage waits 5 s, 1 of them for the transfer. The second waits 4 s, of which 3 until the next is posted.
    assert result.late == pytest.approx((4 + 3) / 2)
    assert result.exposed["pipeline.backward"] == pytest.approx(1 / 2)
    assert result.exposed["pipeline.forward"] == pytest.approx(1 / 2)
    assert two_stages(overlapped=False).seconds == pytest.approx(7)


def test_a_collective_of_stages_begins_with_the_last_one():
    norm = {"label": "pipeline.norm", "verb": "all_reduce", "megabytes": 0, "background": False}
    ranks = [rank(Compute(seconds), post(0, **norm), Wait(0), number=n) for n, seconds in enumerate((1, 3))]
    result = simulate(ranks, Network(1, None, Link(MB, latency=0.5)))
    assert result.seconds == pytest.approx(3.5)
    assert result.late == pytest.approx(1)


def test_ranks_that_do_not_match_are_refused():
    lonely = rank(post(0, label="pipeline.forward[0]", verb="receive", megabytes=0, background=False), Wait(0), number=1)
    with pytest.raises(ValueError, match=r"rank 1 waits for pipeline\.forward, which is never complete"):
        simulate([lonely], Network(1, None, SLOW))


def seconds(network, ranks, verb, megabytes=1.0, stage=8):
    return {load.is_inter_host: load.seconds for load in network.loads(ranks[0], ranks, verb, int(megabytes * MB), stage)}


def test_ranks_of_a_host_share_its_link_to_other_hosts():
    network = Network(4, Link(10 * MB), SLOW)
    assert seconds(network, (0, 1, 2, 3), "all_gather") == pytest.approx({False: 0.1})
    assert seconds(network, (0, 4), "reduce_scatter") == pytest.approx({True: 4})
    # 3 of 7 peers are on the host
    assert seconds(network, tuple(range(8)), "all_to_all") == pytest.approx({False: 0.1 * 3 / 7, True: 4 * 4 / 7})
    # In a ring only one of the host's four sends to the other host: (n - 1) / n of the recorded bytes.
    assert seconds(network, tuple(range(8)), "all_reduce") == pytest.approx({False: 0.1 * 7 / 8, True: 7 / 8})
    assert seconds(network, (0, 4), "all_reduce") == pytest.approx({True: 4 / 2}), "each of the host's four rings has one member here"
    assert seconds(Network(4, Link(10 * MB), SLOW, rings=True), tuple(range(8)), "all_gather") == pytest.approx({False: 0.1, True: 1})
    assert seconds(network, (0, 4), "send", stage=4) == pytest.approx({True: 4}), "the host's four ranks are one stage"
    assert seconds(network, (3, 4), "send", stage=1) == pytest.approx({True: 1}), "the host's other ranks are other stages"
    assert network.loads(0, (0,), "all_gather", MB, 8) == []


@pytest.mark.parametrize(
    ("text", "bandwidth", "latency"),
    [("300mbit,0.5ms", 37.5e6, 5e-4), ("1gbit", 125e6, 0), ("25GB, 5us", 25e9, 5e-6), ("1000 Mbit/s, 0s", 125e6, 0)],
)
def test_a_link_is_read(text, bandwidth, latency):
    assert parse_link(text) == Link(pytest.approx(bandwidth), pytest.approx(latency))


@pytest.mark.parametrize("text", ["fast", "300", "300mbit,half", "0mbit", "300mbit,0.5", "1.2.3gbit"])
def test_what_is_no_link_is_refused(text):
    with pytest.raises(ConfigError, match="a link is its speed and its latency, such as"):
        parse_link(text)
