"""What does autograd keep of a forward pass until its backward pass?

The blocks of `gmask.models` are run here once more, with sizes in place of numbers: each operation notes what torch
keeps for its gradient, once for all operations that share a tensor. Change it with the models; the tests compare it
with what torch keeps. On CUDA devices dropout is taken to keep a byte for each number and attention no weights, which
was not measured.

Shape letters: B rows, T positions, K key positions (a prefix first), H hidden size, F width of the perceptron, N heads,
V vocabulary.
"""

from dataclasses import dataclass

import torch

from gmask.checkpoints.configs import Config
from gmask.models.glm import GLMConfig
from gmask.tasks.recipes.methods import MethodSettings

FLOAT = 4  # bytes of what trains, of attention weights and of log-probabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What decides how much a pass keeps."""

    config: Config
    method: MethodSettings
    dtype: torch.dtype  # of the weights that do not train
    autocast: bool  # to bfloat16
    quantized: frozenset[str]  # linear layers of a block with integers, "lm_head"
    batch_size: int
    length: int
    answer_length: int  # tokens of a row that are predicted
    is_fused: bool  # on a CUDA device

    @property
    def rows(self) -> int:
        return self.batch_size * self.length

    @property
    def trains_weights(self) -> bool:
        return not self.method.makes_adapter

    @property
    def trains_embeddings(self) -> bool:
        return self.method.name == "full"

    @property
    def prefix_length(self) -> int:
        return self.method.prefix_length if self.method.name == "p-tuning-v2" else 0

    @property
    def itemsize(self) -> int:
        """Of the weights."""
        return FLOAT if self.trains_weights else self.dtype.itemsize

    @property
    def has_dropout(self) -> bool:
        """In attention, where it keeps the weights."""
        return isinstance(self.config, GLMConfig) and self.config.attention_dropout > 0


@dataclass(eq=False, slots=True)
class State:
    """A tensor of the pass: how many numbers, of how many bytes each, and whether a gradient flows to it."""

    numbers: int
    itemsize: int
    has_grad: bool = False

    @property
    def nbytes(self) -> int:
        return self.numbers * self.itemsize


class Tape:
    """The operations of the models, and what is kept of them."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.kept: dict[State, None] = {}

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.kept)

    def keep(self, *states: State) -> None:
        self.kept.update(dict.fromkeys(states))

    def as_read(self, x: State) -> State:
        """What a product reads: under autocast a rounded copy."""
        return State(x.numbers, 2, x.has_grad) if self.step.autocast and x.itemsize > 2 else x

    def norm(self, x: State) -> State:
        """Layer normalisation: its input, the means and the deviations."""
        size = FLOAT if self.step.autocast and self.step.is_fused else x.itemsize
        out = State(x.numbers, size, x.has_grad or self.step.trains_weights)
        if out.has_grad:
            read = x if x.itemsize == size else State(x.numbers, size)
            self.keep(read, State(2 * x.numbers // self.step.config.hidden_size, size))
        return out

    def linear(self, layer: str, x: State, outputs: int, *, trains: bool | None = None) -> State:
        """A product; a layer of integers keeps nothing. ``trains``: whether its weight does."""
        trains = self.step.trains_weights if trains is None else trains
        is_quantized = layer in self.step.quantized
        read = self.as_read(x)
        columns = self.columns(layer)
        size = x.itemsize if is_quantized else read.itemsize
        out = State(x.numbers // columns * outputs, size, x.has_grad or trains)
        if layer in self.step.method.adapted_layers and self.step.method.name == "ia3":
            return self._scale(layer, x, out)
        if trains:
            self.keep(read)
        if x.has_grad and not is_quantized:
            self._keep_weight(columns * outputs, self.step.itemsize)
        if layer in self.step.method.adapted_layers:
            self._add_low_rank(x, out, columns, outputs)
        return out

    def columns(self, layer: str) -> int:
        config = self.step.config
        return config.intermediate_size if layer == "dense_4h_to_h" else config.hidden_size

    def _keep_weight(self, numbers: int, itemsize: int) -> None:
        """The copy of a float32 weight that autocast has rounded."""
        if self.step.autocast and itemsize == FLOAT:
            self.keep(State(numbers, 2))

    def _scale(self, layer: str, x: State, out: State) -> State:
        """ia3: the product, or in the perceptron its input, times a trained vector."""
        is_input = layer == "dense_4h_to_h"
        if is_input:
            self.keep(x if x.itemsize == FLOAT else State(x.numbers, FLOAT))
        else:
            self.keep(out)
        if (x.has_grad or is_input) and layer not in self.step.quantized:
            columns = self.columns(layer)
            self._keep_weight(columns * columns * out.numbers // x.numbers, self.step.itemsize)
        return State(out.numbers, out.itemsize, True)

    def _add_low_rank(self, x: State, out: State, columns: int, outputs: int) -> None:
        """lora and its like read their input in float32."""
        step = self.step
        wide = x if x.itemsize == FLOAT else State(x.numbers, FLOAT, x.has_grad)
        if step.method.dropout:
            if x.has_grad:
                self.keep(State(x.numbers, 1 if step.is_fused else FLOAT))
            wide = State(x.numbers, FLOAT, x.has_grad)
        narrow = State(x.numbers // columns * step.method.first_rank, 2 if step.autocast else FLOAT)
        self.keep(self.as_read(wide), narrow)
        self._keep_weight(step.method.first_rank * (outputs + columns * x.has_grad), FLOAT)
        if step.method.name == "dora":  # its magnitudes multiply the product without its bias, and the change
            self.keep(State(out.numbers, max(out.itemsize, step.itemsize)), State(out.numbers, narrow.itemsize))
        out.has_grad = True

    def attention(self, fused: State) -> State:
        """Attention from queries, keys and values in one tensor ``[B, T, 3 H]``."""
        step, heads = self.step, self.step.config.num_attention_heads
        if isinstance(step.config, GLMConfig):
            query, keys = fused, 0
        else:  # turned queries and keys beside the values
            query, keys = State(step.rows * step.config.hidden_size, fused.itemsize), 1
            self._keep_angles(fused.itemsize)
        prefix = step.prefix_length * step.batch_size * step.config.hidden_size
        positions = step.rows * step.config.hidden_size + prefix
        size = 2 if step.autocast else fused.itemsize
        weights = step.batch_size * heads * step.length * (step.length + step.prefix_length)
        out = State(step.rows * step.config.hidden_size, size, fused.has_grad or bool(prefix))
        if step.has_dropout and not step.is_fused:  # written out, in float32
            self.keep(State(step.rows * step.config.hidden_size + 2 * positions, FLOAT), State(3 * weights, FLOAT))
            return out
        if size < fused.itemsize:  # rounded by autocast
            self.keep(State(step.rows * step.config.hidden_size + 2 * positions, size))
        elif prefix:
            self.keep(query if keys else fused, State(2 * positions, size))
        else:
            self.keep(fused, *(State(step.rows * step.config.hidden_size, size) for _ in range(2 * keys)))
        additive = State(weights // heads, size)
        self.keep(out, State(step.rows * heads, FLOAT), additive)
        return out

    def _keep_angles(self, itemsize: int) -> None:
        """Cosines and sines of a head, rounded for queries and for keys; float32 ones are shared by all layers."""
        if itemsize < FLOAT:
            self.keep(State(4 * self.step.rows * self.step.config.head_dim, itemsize))

    def gelu(self, x: State) -> State:
        if x.has_grad:
            self.keep(x)
        return State(x.numbers, x.itemsize, x.has_grad)

    def dropout(self, x: State, rate: float) -> State:
        if rate == 0:
            return x
        if x.has_grad:
            self.keep(State(x.numbers, 1 if self.step.is_fused else x.itemsize))
        return State(x.numbers, x.itemsize, x.has_grad)

    def add(self, x: State, y: State) -> State:
        return State(x.numbers, max(x.itemsize, y.itemsize), x.has_grad or y.has_grad)


def run_block(tape: Tape, hidden: State) -> State:
    """A block of a GLM or a ChatGLM."""
    config = tape.step.config
    size, width = config.hidden_size, config.intermediate_size
    is_glm = isinstance(config, GLMConfig)
    rate = config.hidden_dropout if isinstance(config, GLMConfig) else 0.0
    normed = tape.norm(hidden)
    mixed = tape.attention(tape.linear("query_key_value", normed, 3 * size))
    hidden = tape.add(hidden if is_glm else normed, tape.dropout(tape.linear("dense", mixed, size), rate))
    normed = tape.norm(hidden)
    wide = tape.gelu(tape.linear("dense_h_to_4h", normed, width))
    return tape.add(hidden if is_glm else normed, tape.dropout(tape.linear("dense_4h_to_h", wide, size), rate))


def run_embeddings(tape: Tape) -> State:
    """Words and places; those of a GLM train with everything but the words, too."""
    step, config = tape.step, tape.step.config
    is_glm = isinstance(config, GLMConfig)
    has_grad = step.method.name in ("full", "p-tuning") or (step.trains_weights and is_glm)
    hidden = State(step.rows * config.hidden_size, step.itemsize, has_grad)
    return tape.dropout(hidden, config.embedding_dropout if isinstance(config, GLMConfig) else 0.0)


def run_head(tape: Tape, hidden: State) -> None:
    """The head at the positions that predict something, and the log-probabilities in float32."""
    step = tape.step
    normed = tape.norm(hidden)
    predicted = step.batch_size * step.answer_length
    picked = State(predicted * step.config.hidden_size, normed.itemsize, normed.has_grad)
    tape.linear("lm_head", picked, step.config.vocab_size, trains=step.trains_embeddings)
    tape.keep(State(predicted * step.config.vocab_size, FLOAT))


def block_bytes(step: Step, *, is_first: bool) -> int:
    """What a block keeps; below the first one gradients may end, and less is kept."""
    tape = Tape(step)
    hidden = run_embeddings(Tape(step)) if is_first else state_between(step)
    run_block(tape, hidden)
    return tape.nbytes


def state_between(step: Step) -> State:
    """What one block hands to the next."""
    return run_block(Tape(step), run_embeddings(Tape(step)))


def end_bytes(step: Step) -> int:
    """What the embeddings and the head keep, with the log-probabilities."""
    tape = Tape(step)
    run_embeddings(tape)
    run_head(tape, state_between(step))
    return tape.nbytes
