"""Cut connections: what a switch that resets does, while all processes live on."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from raytrain_het.membership.server import Hub


def cut(hub: Hub, slots: Collection[int] | None = None) -> int:
    """Reset connections between the hub and its members.

    Args:
        hub: whose.
        slots: of the members; None is all.

    Returns:
        How many were reset. Members are connecting again when this returns.
    """

    async def reset() -> int:
        links = [link for link in hub._links.values() if slots is None or link.member.slot in slots]
        for link in links:
            link.transport.abort()
        return len(links)

    return asyncio.run_coroutine_threadsafe(reset(), hub._loop).result(timeout=30)
