"""Which chunks of a request a step completes, and what became of each. Not the writing: see saver.py."""

from typing import Any

from objectcache.index import KnownChunks
from objectcache.messages import SaveCommand
from objectcache.tracked import Saving, Tracked


class Saves:
    """`shards` workers save each chunk; what all of them have is `known` to exist."""

    def __init__(
        self, chunk_tokens: int, block_tokens: int, shards: int, known: KnownChunks
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._block_tokens = block_tokens
        self._shards = shards
        self._known = known
        self._saving: dict[bytes, Saving] = {}

    def of(self, tracked: Tracked, tokens: int, block_ids: Any, now: float) -> list[SaveCommand]:
        """Chunks of one request that a step of so many of its tokens completes and that are not in the
        store. `block_ids(request_id)` gives all its blocks."""
        request = tracked.request
        # Tokens that are known and, after this step, computed: neither drafts nor placeholders.
        computed = min(request.num_computed_tokens + tokens, request.num_tokens)
        whole = computed // self._chunk_tokens
        if whole <= tracked.save_from:
            return []  # so it is in nearly every step, and for each request
        whole = min(whole, tracked.extended(self._chunk_tokens))
        if whole <= tracked.save_from:
            return []
        per_chunk = self._chunk_tokens // self._block_tokens
        blocks = block_ids(request.request_id)
        saves = []
        for chunk in range(tracked.save_from, whole):
            chunk_hash = tracked.chain.hashes[chunk]
            if chunk_hash in self._saving or self._known.has(chunk_hash, now):
                continue
            self._saving[chunk_hash] = Saving(tracked, chunk)
            saves.append(
                SaveCommand(chunk_hash, list(blocks[chunk * per_chunk : (chunk + 1) * per_chunk]))
            )
        tracked.save_from = whole
        return saves

    def saved(self, chunk_hash: bytes, outcome: str, now: float) -> None:
        """One shard says what became of a chunk."""
        saving = self._saving.get(chunk_hash)
        if saving is None:
            return
        saving.outcomes.append(outcome)
        if len(saving.outcomes) < self._shards:
            return
        del self._saving[chunk_hash]
        if all(outcome in ("written", "existed") for outcome in saving.outcomes):
            self._known.add(chunk_hash, now)
        elif "dropped" in saving.outcomes:  # there was no room: again in the request's next step
            saving.tracked.save_from = min(saving.tracked.save_from, saving.chunk)

    def clear(self) -> None:
        """What is on its way counts for nothing any more."""
        self._saving.clear()
