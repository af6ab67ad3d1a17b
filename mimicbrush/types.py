"""The values that are passed between the packages, and the legend of their shapes.

Legend: ``B`` batch, ``C`` channels, ``H W`` pixels, ``h w`` latents, ``N`` tokens, ``D`` context width.
Pixels are RGB in [-1, 1] as float tensors (B, 3, H, W), or uint8 in 0..255 as arrays (H, W, 3).
A **mask** is 1 where the source is to be repainted and 0 where it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    #: Keys and values of an attention layer, (B, N, heads, C / heads) each.
    KeysValues = tuple[torch.Tensor, torch.Tensor]


class AttentionRecord(Protocol):
    """Recorder of where reference attention goes, such as `models.attention_recorder.CorrespondenceRecorder`."""

    def add(self, path: str, query: torch.Tensor, reference_key: torch.Tensor, lse: torch.Tensor, blend: float) -> None:
        """Add one layer's attention at one step.

        Args:
            path: of the layer's module in the imitative U-Net.
            query: (R, N, heads, d), of the rows that have a reference.
            reference_key: (R, M, heads, d).
            lse: (R, N, heads), log-sum-exp of the scores over [own ; reference].
            blend: how much of what the softmax over both gives is used.
        """


class ReferenceStates:
    """Value that the caller passes to both U-Nets: the reference U-Net writes into it, the imitative U-Net reads it.

    No dataclass: FSDP copies those on their way through a network, and what is written into a copy is lost.

    Attributes:
        features: module path of a self-attention layer -> (R, N, C), the *normalised hidden states* that
            enter that layer in the reference U-Net (released code).
        keys_values: module path -> keys and values that are projected already: of a self-attention layer
            the reference's, (R, N, heads, d) each (the paper's way of sharing, or features projected once for
            several steps); of a cross-attention layer those of the context, for all B rows.
        keep: (R,) bool, or None for all. Rows that are False read themselves alone, as if no reference
            had been given (classifier-free guidance, paper Sec. 4.1).
        blend: how much the reference's attention counts, see `ReferenceReadProcessor`; None is the layer's own.
        record: receives every reference attention, in inference; None: nothing is recorded.
        queries_and_keys: gets the query and the reference's key of every reading layer, (R, N, heads, d) and
            (R, M, heads, d) by module path, for the correspondence loss; None keeps none.
        is_of_one_block: the keys are no module paths, but names within one ``attentions.N`` block of a U-Net, see
            `select_block`.
        is_writing: whether a U-Net that does both writes into these states; it reads otherwise.

    Of several references of a row, M counts the tokens of all, one reference after the other.

    With R < B rows, the features belong to the *last* R rows of the batch, and the first B - R rows read
    themselves alone: the order [unconditional, conditional] of classifier-free guidance.
    """

    def __init__(
        self,
        features: dict[str, torch.Tensor] | None = None,
        keys_values: dict[str, KeysValues] | None = None,
        keep: torch.Tensor | None = None,
        blend: float | None = None,
        record: AttentionRecord | None = None,
        queries_and_keys: dict[str, KeysValues] | None = None,
        is_writing: bool = False,
    ) -> None:
        self.features = {} if features is None else features
        self.keys_values = {} if keys_values is None else keys_values
        self.keep, self.blend, self.record, self.queries_and_keys = keep, blend, record, queries_and_keys
        self.is_of_one_block, self.is_writing = False, is_writing

    @property
    def holds_reference(self) -> bool:
        """Whether it holds more than a context."""
        return bool(self.features) or any(".attn1" in path for path in self.keys_values)

    def for_writing(self) -> ReferenceStates:
        """Return states to write into; what is written there is here, too."""
        return ReferenceStates(self.features, self.keys_values, is_writing=True)

    def select_block(self, path: str) -> ReferenceStates:
        """Return what concerns one block, such as ``up_blocks.1.attentions.0``, by names within it."""
        start = f"{path}."
        chosen = ReferenceStates(
            {key.removeprefix(start): value for key, value in self.features.items() if key.startswith(start)},
            {key.removeprefix(start): value for key, value in self.keys_values.items() if key.startswith(start)},
            self.keep,
            self.blend,
            self.record,
            None if self.queries_and_keys is None else {},
            self.is_writing,
        )
        chosen.is_of_one_block = True
        return chosen

    def add_block(self, path: str, block: ReferenceStates) -> None:
        """Take what a block has written into the states that `select_block` gave it."""
        self.features.update({f"{path}.{name}": value for name, value in block.features.items()})
        self.keys_values.update({f"{path}.{name}": value for name, value in block.keys_values.items()})
        if self.queries_and_keys is not None and block.queries_and_keys is not None:
            self.queries_and_keys.update({f"{path}.{name}": value for name, value in block.queries_and_keys.items()})


class Matches:
    """Matching places: those of the source, and those of the reference that show the same.

    No dataclass: FSDP casts the tensors of those to its half precision, which moves places by a pixel.

    Attributes:
        source_xy: (B, K, 2) float32, x and y in pixels of the canvas, pixel centres at whole numbers.
        reference_xy: (B, K, 2) float32, likewise.
        is_match: (B, K) bool; False where a sample has fewer than K, and the places mean nothing.
    """

    def __init__(self, source_xy: torch.Tensor, reference_xy: torch.Tensor, is_match: torch.Tensor) -> None:
        self.source_xy, self.reference_xy, self.is_match = source_xy, reference_xy, is_match

    def to(self, device: torch.device) -> Matches:
        """Move the matches to another device."""
        return Matches(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))

    def pin_memory(self) -> Matches:
        """Copy the matches to page-locked memory."""
        return Matches(*(tensor.pin_memory() for tensor in vars(self).values()))


_TENSORS = ("source", "reference", "mask", "key", "index")


@dataclass
class TrainBatch:
    """Batch of samples for one step. All pixels are square and already augmented, padded and resized.

    Attributes:
        source: (B, 3, H, W) float, [-1, 1], *unmasked*: it is also what must be recovered.
        reference: (B, 3, H, W) float, [-1, 1], the first of R.
        mask: (B, 1, H, W) float, 0 or 1; 1 = repaint.
        key: (B,) int64, the seed of everything random that happens to a sample after loading (noise,
            timestep, drops), so that results do not depend on ranks or workers.
        index: (B,) int64, the global sample number.
        faults: what could not be read and was replaced by other pairs, a message each; not one per sample.
        matches: of source and first reference, for the correspondence loss; None where it is not trained with.
        other_references: (B, R-1, 3, H, W) float, [-1, 1]; None for R = 1.
    """

    source: torch.Tensor
    reference: torch.Tensor
    mask: torch.Tensor
    key: torch.Tensor
    index: torch.Tensor
    faults: tuple[str, ...] = ()
    matches: Matches | None = None
    other_references: torch.Tensor | None = None

    @property
    def num_references(self) -> int:
        """References of each sample, R."""
        return 1 if self.other_references is None else 1 + self.other_references.shape[1]

    @property
    def references(self) -> torch.Tensor:
        """All references, (B, R, 3, H, W)."""
        import torch

        first = self.reference[:, None]
        return first if self.other_references is None else torch.cat([first, self.other_references], dim=1)

    def to(self, device: torch.device) -> TrainBatch:
        """Move the batch to another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in self._tensor_names()}
        return replace(self, **moved, matches=self.matches and self.matches.to(device))

    def pin_memory(self) -> TrainBatch:
        """Copy the batch to page-locked memory: torch's DataLoader looks for this method."""
        pinned = {name: getattr(self, name).pin_memory() for name in self._tensor_names()}
        return replace(self, **pinned, matches=self.matches and self.matches.pin_memory())

    def _tensor_names(self) -> tuple[str, ...]:
        return _TENSORS if self.other_references is None else (*_TENSORS, "other_references")

    def __len__(self) -> int:
        return self.source.shape[0]


#: What the frozen encoders make of a sample, before noise and drops.
ENCODED_TENSORS = ("mean", "std", "latent_mask", "image_tokens", "depth_map")


@dataclass
class EncodedViews:
    """Batch of samples that the frozen encoders have seen already, before noise and drops; half precision or more.

    Attributes:
        mean, std: (B, 3, 4, h, w), the VAE's posteriors of source, masked source and reference, not scaled.
        latent_mask: (B, 1, h, w), 0 or 1; 1 = repaint.
        image_tokens: (B, N, C) of the reference.
        depth_map: (B, 1, any, any) of the source.
        key, index, faults, matches: as in `TrainBatch`.
    """

    mean: torch.Tensor
    std: torch.Tensor
    latent_mask: torch.Tensor
    image_tokens: torch.Tensor
    depth_map: torch.Tensor
    key: torch.Tensor
    index: torch.Tensor
    faults: tuple[str, ...] = ()
    matches: Matches | None = None

    @property
    def num_references(self) -> int:
        """References of each sample: what is encoded once has one."""
        return 1

    def to(self, device: torch.device) -> EncodedViews:
        """Move the batch to another device, and make everything that is encoded float32 there."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in (*ENCODED_TENSORS, "key", "index")}
        moved |= {name: moved[name].float() for name in ENCODED_TENSORS}
        return replace(self, **moved, matches=self.matches and self.matches.to(device))

    def pin_memory(self) -> EncodedViews:
        """Copy the batch to page-locked memory: torch's DataLoader looks for this method."""
        pinned = {name: getattr(self, name).pin_memory() for name in (*ENCODED_TENSORS, "key", "index")}
        return replace(self, **pinned, matches=self.matches and self.matches.pin_memory())

    def __len__(self) -> int:
        return len(self.key)
