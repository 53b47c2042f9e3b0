"""Next-token scores of growing sequences: the models' side of sampling, with a key-value cache.

`DecoderGeneration` runs our own decoder, `ModelGeneration` transformers' forward pass; the sampler
does not see the difference.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ppo_engine.decoder import Decoder, GroupAdapters, LinearGroup, Rotation, rms_norm
from ppo_engine.logprobs import OutputHead
from ppo_engine.packing import Packed, common_prefix, pack


class Generation(Protocol):
    """Sequences in the making; row i of every tensor belongs to sequence i."""

    def start(self, tokens: Tensor, attention_mask: Tensor, *, copies: int) -> Tensor:
        """Scores [B·copies, V] after prompts [B, P]; copies of a prompt stand side by side."""

    def step(self, tokens: Tensor) -> Tensor:
        """Scores z/τ [B, V] after one more token of each sequence; [B] in."""

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""


class DecoderGeneration:
    """Our own decoder: prompts are read once per group, keys stand where they stay."""

    def __init__(
        self,
        decoder: Decoder,
        head: OutputHead,
        adapter: str | None,
        *,
        max_response_tokens: int,
    ) -> None:
        self._decoder = decoder
        self._head = head
        self._adapters = decoder.group_adapters(adapter)
        self._adapter = adapter
        self._room = max_response_tokens
        self._shared: list[tuple[Tensor, Tensor]] = []
        """Keys and values of the shared beginning by layer, [kv, L, d]."""
        self._cache: list[tuple[Tensor, Tensor]] = []
        """Of each sequence's own tokens by layer, [B, kv, C, d]."""
        self._lengths: Tensor
        """[B]; own tokens so far."""
        self._prefix = 0
        """Tokens of the shared beginning."""

    def start(self, tokens: Tensor, attention_mask: Tensor, *, copies: int) -> Tensor:
        """Scores [B·copies, V] after prompts [B, P]; copies of a prompt stand side by side."""
        read = torch.zeros_like(attention_mask)
        read[:, -1] = True
        self._prefix = common_prefix(tokens, attention_mask, read)
        packed = pack(attention_mask, read, prefix=self._prefix)
        layers: list[Tensor] = []
        states = self._decoder.states(tokens, packed, adapter=self._adapter, collected=layers)
        lengths = attention_mask.sum(dim=1) - self._prefix
        self._lengths = lengths.repeat_interleave(copies)
        places = _own_places(packed, lengths)
        for qkv in layers:
            self._remember(qkv, places, copies)
        return self._head.scores_of_few(states).repeat_interleave(copies, dim=0)

    def _remember(self, qkv: Tensor, places: Tensor, copies: int) -> None:
        """Keys and values of one layer's prompts, with room for the responses."""
        decoder = self._decoder
        kv, size = decoder.kv_heads, decoder.head_size
        parts = qkv[:, decoder.heads * size :].unflatten(1, (2, kv, size))
        keys, values = parts[: self._prefix].permute(1, 2, 0, 3).contiguous()
        self._shared.append((keys, values))
        rows, columns = places.shape
        room = qkv.new_zeros(2, rows * copies, kv, columns + self._room, size)
        own = parts[places].permute(2, 0, 3, 1, 4)
        room[:, :, :, :columns] = own.repeat_interleave(copies, dim=1)
        self._cache.append((room[0], room[1]))

    def step(self, tokens: Tensor) -> Tensor:
        """Scores z/τ [B, V] after one more token of each sequence; [B] in."""
        decoder = self._decoder
        rotation = decoder.rotation(self._prefix + self._lengths)
        longest = int(self._lengths.max()) + 1
        columns = torch.arange(longest, device=tokens.device)
        is_ahead = columns > self._lengths[:, None]
        hidden = decoder.embedded(tokens)
        for number, layer in enumerate(decoder.layers):
            adapters = self._adapters[number]
            normed = rms_norm(hidden, layer.attention_norm, decoder.epsilon)
            qkv = _columns(layer.qkv, normed, adapters[0])
            attended = self._attend(number, qkv, rotation, is_ahead)
            hidden = _columns(layer.output, attended, adapters[1]).add_(hidden)
            normed = rms_norm(hidden, layer.mlp_norm, decoder.epsilon)
            gate, up = _columns(layer.gate_up, normed, adapters[2]).chunk(2, dim=1)
            product = nn.functional.silu(gate).mul_(up)
            hidden = _columns(layer.down, product, adapters[3]).add_(hidden)
        self._lengths = self._lengths + 1
        states = rms_norm(hidden, decoder.norm, decoder.epsilon)
        return self._head.scores_of_few(states)

    def _attend(self, number: int, qkv: Tensor, rotation: Rotation, is_ahead: Tensor) -> Tensor:
        """One token of each sequence looks back, [B, heads·d]; its key and value are kept."""
        decoder = self._decoder
        kv, size = decoder.kv_heads, decoder.head_size
        heads = qkv.unflatten(1, (-1, size)).contiguous()
        rotation.turn(heads[:, : decoder.heads + kv])
        queries, new_keys, new_values = heads.split([decoder.heads, kv, kv], dim=1)
        keys, values = self._cache[number]
        rows = torch.arange(len(heads), device=heads.device)
        keys[rows, :, self._lengths] = new_keys
        values[rows, :, self._lengths] = new_values
        keys, values = (each[:, :, : is_ahead.shape[1]] for each in (keys, values))
        queries = queries.unflatten(1, (kv, -1)) * size**-0.5
        scores = queries @ keys.transpose(2, 3)
        scores = scores.masked_fill(is_ahead[:, None, None], -torch.inf)
        if self._prefix:
            shared_keys, shared_values = self._shared[number]
            together = queries.transpose(0, 1).flatten(1, 2)
            of_shared = (together @ shared_keys.transpose(1, 2)).unflatten(1, (len(heads), -1))
            scores = torch.cat([of_shared.transpose(0, 1), scores], dim=3)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(decoder.dtype)
        mixed = weights[..., self._prefix :] @ values
        if self._prefix:
            of_shared = weights[..., : self._prefix].transpose(0, 1).flatten(1, 2) @ shared_values
            mixed += of_shared.unflatten(1, (len(heads), -1)).transpose(0, 1)
        return mixed.flatten(1)

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""
        self._lengths = self._lengths[rows]
        self._cache = [(keys[rows], values[rows]) for keys, values in self._cache]


def _columns(group: LinearGroup, inputs: Tensor, adapters: GroupAdapters) -> Tensor:
    """A group's outputs [N, Σ out] for few tokens [N, in], computed as columns."""
    result = group.weight @ inputs.t()
    if group.bias is not None:
        result += group.bias[:, None]
    if adapters.down is not None:
        inner = adapters.down @ inputs.t()
        for part, rank, up in adapters.ups:
            result[part].addmm_(up, inner[rank])
    return result.t()


def _own_places(packed: Packed, lengths: Tensor) -> Tensor:
    """Where each prompt's own tokens stand in the flat sequence, [B, C]; behind its end anything.

    `kept` holds the place of every row's last token.
    """
    longest = int(lengths.max())
    first = packed.kept[: packed.num_kept] - lengths + 1
    places = first[:, None] + torch.arange(longest, device=lengths.device)
    return places.clamp(max=len(packed.sources) - 1)


class ModelGeneration:
    """Transformers' forward pass and cache, for models that our decoder does not know."""

    def __init__(self, forward: "CachedForward", head: OutputHead) -> None:
        self._forward = forward
        self._head = head
        self._cache: Any = None
        self._mask: Tensor
        self._positions: Tensor

    def start(self, tokens: Tensor, attention_mask: Tensor, *, copies: int) -> Tensor:
        """Scores [B·copies, V] after prompts [B, P]; copies of a prompt stand side by side."""
        positions = position_ids(attention_mask)
        states, self._cache = self._forward(tokens, attention_mask, positions, None)
        self._cache.batch_repeat_interleave(copies)
        self._mask = attention_mask.repeat_interleave(copies, dim=0)
        self._positions = positions[:, -1:].repeat_interleave(copies, dim=0)
        return self._scores(states).repeat_interleave(copies, dim=0)

    def step(self, tokens: Tensor) -> Tensor:
        """Scores z/τ [B, V] after one more token of each sequence; [B] in."""
        self._mask = nn.functional.pad(self._mask, (0, 1), value=True)
        self._positions = self._positions + 1
        states, self._cache = self._forward(
            tokens[:, None], self._mask, self._positions, self._cache
        )
        return self._scores(states)

    def _scores(self, states: Tensor) -> Tensor:
        return self._head.scores_of_few(states[:, -1])

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""
        self._cache.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]


class CachedForward(Protocol):
    """A model's forward pass that grows a cache."""

    def __call__(
        self, tokens: Tensor, attention_mask: Tensor, positions: Tensor, cache: Any
    ) -> tuple[Tensor, Any]:
        """Hidden states [B, Q, H] of new tokens [B, Q], and the grown cache."""


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding moves nothing; [B, S] int64."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
