"""Schedules for tests: every kind, of any size."""

from hypothesis import strategies as st

from lightning_overlap.steps.named_schedules import SCHEDULES, STAGES_OF_A_RANK, build


def virtual_of(name, asked):
    """A number of stages a rank that the schedule can have."""
    return STAGES_OF_A_RANK.get(name, max(asked, 2) if name.startswith("interleaved") else asked)


schedules = st.builds(
    lambda name, ranks, virtual, microbatches: build(name, ranks, virtual_of(name, virtual), microbatches),
    st.sampled_from(sorted(SCHEDULES)),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 20),
)
