"""Which samples of a batch share a row, so that little of it is padding.

The samples of an optimiser step stay the same with and without packing; only their layout changes.
"""

import heapq

SLACK = 0.01  # of the slots, traded for shorter rows, whose attention is cheaper


def pack(lengths: list[int], max_tokens_per_row: int) -> list[list[int]]:
    """Distributes samples over rows of about equal length.

    For each possible number of rows, the longest sample left goes to the shortest row, repeatedly; of the layouts whose
    rows fit, the one with the fewest slots (rows times the longest row) wins, and of about equal ones that with the
    shortest rows.

    Args:
        lengths: tokens of each sample.
        max_tokens_per_row: the most tokens a row may have; a sample longer than that gets a row of its own length.

    Returns:
        The indices of each row's samples, in the order given, rows ordered by their first sample.
    """
    limit = max(max_tokens_per_row, max(lengths))
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    layouts = []
    for count in range(-(-sum(lengths) // limit), len(lengths) + 1):
        rows: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]
        for index in longest_first:
            length, number, members = heapq.heappop(rows)
            heapq.heappush(rows, (length + lengths[index], number, [*members, index]))
        width = max(length for length, _, _ in rows)
        if width <= limit:
            layouts.append((count * width, width, [members for _, _, members in rows]))
    fewest = min(slots for slots, _, _ in layouts)
    _, _, chosen = min((layout for layout in layouts if layout[0] <= fewest * (1 + SLACK)), key=lambda layout: layout[1])
    return sorted(sorted(members) for members in chosen)
