"""Keys and values of growing sequences, and how one more token of each looks back at them."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ppo_engine.attention import HeadShape, is_fused, row_ends
from ppo_engine.native import MOST_HEAD_NUMBERS, kernels_for


class Prompts(NamedTuple):
    """What a cache starts from: the prompts' queries, keys and values as the layers made them."""

    layers: list[Tensor]
    """[N, (queries + 2·keys)·d] of each layer, packed."""
    prefix: int
    """Leading packed tokens that belong to every prompt."""
    places: Tensor
    """[R, C]; where the prompts' own tokens stand, packed; behind a prompt's end anything."""
    lengths: Tensor
    """[R]; own tokens of each prompt."""
    copies: int
    """Sequences that go on from each prompt; they stand side by side."""
    room: int
    """Tokens that each sequence may grow by."""


class KeyValues(Protocol):
    """A cache of B sequences."""

    positions: Tensor
    """[B]; place of the next token in its sequence."""

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        """Attention of the next tokens, [B, queries·d]; keeps their keys and values.

        In: rotated queries, keys and values [B, queries + 2·keys, d].
        """

    def advance(self) -> None:
        """The next tokens are in; on to those after them."""

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""


def key_values(prompts: Prompts, shape: HeadShape) -> KeyValues:
    """The cache that suits the prompts' device and number format."""
    if is_fused(prompts.layers[0], shape):
        return FusedKeyValues(prompts, shape)
    if kernels_for(prompts.layers[0]) is not None and shape.size <= MOST_HEAD_NUMBERS:
        return NativeKeyValues(prompts, shape)
    return PlainKeyValues(prompts, shape)


class PlainKeyValues:
    """Products of matrices; a shared beginning is held once."""

    def __init__(self, prompts: Prompts, shape: HeadShape) -> None:
        self._shape = shape
        self._prefix = prompts.prefix
        self._lengths = prompts.lengths.repeat_interleave(prompts.copies)
        """[B]; own tokens so far."""
        self._shared: list[tuple[Tensor, Tensor]] = []
        """Keys and values of the shared beginning by layer, [kv, L, d]."""
        self._own: list[tuple[Tensor, Tensor]] = []
        """Of each sequence's own tokens by layer, [B, kv, C, d]."""
        for qkv in prompts.layers:
            self._remember(_pairs(qkv, shape), prompts)
        self._look()

    def _remember(self, pairs: Tensor, prompts: Prompts) -> None:
        """One layer's prompts, with room for the responses."""
        keys, values = pairs[: self._prefix].permute(1, 2, 0, 3).contiguous()
        self._shared.append((keys, values))
        own = pairs[prompts.places].permute(2, 0, 3, 1, 4)
        columns = own.shape[3]
        shape = (2, len(self._lengths), self._shape.keys, columns + prompts.room, self._shape.size)
        room = pairs.new_zeros(shape)
        room[:, :, :, :columns] = own.repeat_interleave(prompts.copies, dim=1)
        self._own.append((room[0], room[1]))

    def _look(self) -> None:
        """What the next tokens may see."""
        self.positions = self._prefix + self._lengths
        columns = torch.arange(int(self._lengths.max()) + 1, device=self._lengths.device)
        self._is_ahead = columns > self._lengths[:, None]

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        """Attention of the next tokens, [B, queries·d]; keeps their keys and values."""
        kv, size = self._shape.keys, self._shape.size
        queries, new_keys, new_values = heads.split([self._shape.queries, kv, kv], dim=1)
        keys, values = self._own[layer]
        rows = torch.arange(len(heads), device=heads.device)
        keys[rows, :, self._lengths] = new_keys
        values[rows, :, self._lengths] = new_values
        keys, values = (each[:, :, : self._is_ahead.shape[1]] for each in (keys, values))
        queries = queries.unflatten(1, (kv, -1)) * size**-0.5
        scores = queries @ keys.transpose(2, 3)
        scores = scores.masked_fill(self._is_ahead[:, None, None], -torch.inf)
        if self._prefix:
            shared_keys, shared_values = self._shared[layer]
            together = queries.transpose(0, 1).flatten(1, 2)
            of_shared = (together @ shared_keys.transpose(1, 2)).unflatten(1, (len(heads), -1))
            scores = torch.cat([of_shared.transpose(0, 1), scores], dim=3)
        weights = torch.softmax(scores, dim=-1)  # in fp32, but for the result
        mixed = weights[..., self._prefix :] @ values
        if self._prefix:
            of_shared = weights[..., : self._prefix].transpose(0, 1).flatten(1, 2) @ shared_values
            mixed += of_shared.unflatten(1, (len(heads), -1)).transpose(0, 1)
        return mixed.flatten(1)

    def advance(self) -> None:
        """The next tokens are in; on to those after them."""
        self._lengths = self._lengths + 1
        self._look()

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""
        self._lengths = self._lengths[rows]
        self._own = [(keys[rows], values[rows]) for keys, values in self._own]
        self._look()


class NativeKeyValues(PlainKeyValues):
    """A kernel of our own for the whole of a layer's attention."""

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        """Attention of the next tokens, [B, queries·d]; keeps their keys and values."""
        kernels = kernels_for(heads)
        assert kernels is not None  # noqa: S101 - or there was no such cache
        return kernels.attend_next(heads, self._shared[layer], self._own[layer], self._lengths)


class FusedKeyValues:
    """FlashAttention over each sequence's slot of one tensor.

    Every tensor keeps its place and shape from token to token, so that the work on a token can be
    recorded once and played again; the kernel reads the lengths from the device.
    """

    def __init__(self, prompts: Prompts, shape: HeadShape) -> None:
        self._shape = shape
        lengths = prompts.lengths.repeat_interleave(prompts.copies)
        self.positions = lengths + prompts.prefix
        columns = prompts.places.shape[1]
        self._slot = prompts.prefix + columns + prompts.room
        self._layers: list[Tensor] = []
        """Keys and values by layer, [B, slot, 2·kv, d]."""
        for qkv in prompts.layers:
            pairs = _pairs(qkv, shape).flatten(1, 2)
            slots = pairs.new_zeros(len(lengths), self._slot, 2 * shape.keys, shape.size)
            slots[:, : prompts.prefix] = pairs[: prompts.prefix]
            own = pairs[prompts.places].repeat_interleave(prompts.copies, dim=0)
            slots[:, prompts.prefix : prompts.prefix + columns] = own
            self._layers.append(slots)
        self._lay_out()

    def _lay_out(self) -> None:
        rows, device = len(self.positions), self.positions.device
        self._queries = row_ends([1] * rows, device)
        self._slots = row_ends([self._slot] * rows, device)
        self._used = (self.positions + 1).int()
        """[B]; tokens that the next ones see, themselves too."""
        self._next = torch.arange(rows, device=device) * self._slot + self.positions
        """[B]; where the next keys and values go in the flattened slots."""

    def attend(self, layer: int, heads: Tensor) -> Tensor:
        """Attention of the next tokens, [B, queries·d]; keeps their keys and values."""
        queries, pairs = heads.split([self._shape.queries, 2 * self._shape.keys], dim=1)
        seen = self._layers[layer].flatten(0, 1)
        seen.index_copy_(0, self._next, pairs)
        keys, values = seen.chunk(2, dim=1)
        result: Tensor = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
            queries,
            keys,
            values,
            self._queries,
            self._slots,
            1,
            self._slot,
            0.0,
            False,  # noqa: FBT003 - positions alone
            False,  # noqa: FBT003
            seqused_k=self._used,
        )[0]
        return result.flatten(1)

    def advance(self) -> None:
        """The next tokens are in; on to those after them."""
        self.positions += 1
        self._used += 1
        self._next += 1

    def keep(self, rows: Tensor) -> None:
        """Go on with the numbered sequences alone; [B'] int64."""
        self.positions = self.positions[rows]
        self._layers = [slots[rows] for slots in self._layers]
        self._lay_out()


def _pairs(qkv: Tensor, shape: HeadShape) -> Tensor:
    """Keys and values of [N, (queries + 2·keys)·d], as [N, 2, keys, d]; a view."""
    pairs: Tensor = qkv[:, shape.widths[0] :].unflatten(1, (2, shape.keys, shape.size))
    return pairs
