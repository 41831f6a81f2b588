"""A plan as a table, for people."""

from rich.table import Table

from ..config import SmileConfig
from .plan import Plan, estimate_seconds
from .svd import low_rank_svd, truncated_svd


def plan_table(plan: Plan, config: SmileConfig, title: str) -> Table:
    """The cost of an upscaling, with the time to factor all deltas, which is measured on noise.

    Raises ConfigError if a budget is too small for the router rows.
    """
    table, device = Table(title=title, show_header=False), config.compute_device
    for name, value in {**plan.summary(), **plan.budget_summary(config)}.items():
        table.add_row(name, value)
    seconds = estimate_seconds(
        plan, lambda delta, rank: truncated_svd(delta.to(device), rank),
        lambda b, a: low_rank_svd(b.to(device), a.to(device)), plan.num_workers(device),
    )  # fmt: skip
    table.add_row("time to factor, from files or memory", f"{seconds:.1f} s")
    return table
