"""Which rows of a site are tokens: each tower and each call by its own mask, counted by hand from the masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hf_lambda_gelu as hlg
from hf_lambda_gelu.measurement.chosen_rows import chosen_rows

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IMAGE: dict[str, Any] = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
Batch = dict[str, Tensor]


def ids(size: int, length: int) -> Tensor:
    return torch.randint(3, 99, (size, length), generator=torch.Generator().manual_seed(0))


def mask(size: int, length: int, padding: int, left: bool = False) -> Tensor:
    """The first example has so much padding."""
    made = torch.ones(size, length, dtype=torch.long)
    made[0, slice(0, padding) if left else slice(length - padding, length)] = 0
    return made


def pixels(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def counted(model: nn.Module, batch: Batch, **kwargs: Any) -> dict[str, tuple[int, int | None]]:
    """{site: (tokens, padding)}, of calibrate; and the refit must have seen the same."""
    hlg.convert(model.eval(), **kwargs)
    report = hlg.calibrate(model, [batch] * 2)
    seen = {site.name: (site.tokens // 2, None if site.padding is None else site.padding // 2) for site in report.sites}
    compensation = hlg.relu_ize(model, calibration=[batch] * 2, compensate="bias").compensation
    assert compensation is not None
    for site in compensation.sites:
        tokens, padding = seen[site.name]
        assert (site.rows, site.padding) == (2 * tokens, 2 * (padding or 0)), site
        assert ("padding counted too" in site.note) == (padding is None)
    return seen


def by_part(seen: dict[str, tuple[int, int | None]], depth: int = 1) -> dict[str, set[tuple[int, int | None]]]:
    found: dict[str, set[tuple[int, int | None]]] = {}
    for name, numbers in seen.items():
        found.setdefault(".".join(name.split(".")[:depth]), set()).add(numbers)
    return found


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("name", ["electra", "roberta", "xlm-roberta"])
def test_chunks(name: str, chunk: int, left: bool) -> None:
    """Feed-forward in chunks sees the tokens that it sees at once."""
    config = tf.AutoConfig.for_model(name, **TEXT, chunk_size_feed_forward=chunk, pad_token_id=0)
    seen = counted(tf.AutoModel.from_config(config), {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 5, left)})
    assert set(seen.values()) == {(31, 5)}


def test_segments_of_packed_sequences() -> None:
    """A mask that numbers the packed sequences is no other mask; without a mask all are tokens."""
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 3, 3]])
    model = tf.BertModel(tf.BertConfig(**TEXT))
    assert set(counted(model, {"input_ids": ids(2, 6), "attention_mask": segments}).values()) == {(11, 1)}
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**TEXT, num_key_value_heads=2))
    packed = {"input_ids": ids(1, 12), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])}
    assert set(counted(model, packed).values()) == {(12, 0)}


def test_as_many_examples_as_positions() -> None:
    """XLNet has positions first, BERT examples: a mask of 9 × 9 says the same of both."""
    batch = {"input_ids": ids(9, 9), "attention_mask": mask(9, 9, 4, left=True)}
    batch["attention_mask"][1, 0] = 0
    xlnet = tf.XLNetModel(tf.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=48))
    hlg.convert(xlnet.eval())
    x: list[Tensor] = []
    handle = next(iter(hlg.hardness_sites(xlnet).values())).register_forward_pre_hook(lambda _, args: x.append(args[0]))
    (site, _) = hlg.calibrate(xlnet, [batch]).sites
    handle.remove()
    kept = x[0].movedim(0, 1)[batch["attention_mask"] != 0]  # (positions, examples) turned round
    assert (site.tokens, site.padding) == (76, 5)
    assert site.mean == pytest.approx(float(kept.double().mean()), rel=1e-5)
    bert = tf.BertModel(tf.BertConfig(**TEXT))
    assert set(counted(bert, batch).values()) == {(76, 5)}


@pytest.mark.parametrize("size", [17, 11])
def test_images_beside_text(size: int) -> None:
    """The text's mask is not the image's, whether it has as many positions (16 patches and one) or not."""
    config = tf.CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=IMAGE, projection_dim=16)
    batch = {"input_ids": ids(4, size), "attention_mask": mask(4, size, 6), "pixel_values": pixels()}
    seen = by_part(counted(tf.CLIPModel(config), batch))
    assert seen == {"text_model": {(4 * size - 6, 6)}, "vision_model": {(68, 0)}}


def test_images_among_text() -> None:
    """LLaVA: patches have no mask, the language model has its own; of the projector between it cannot be told."""
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT, num_key_value_heads=2),
        vision_config=tf.CLIPVisionConfig(**IMAGE),
        image_token_index=2,
        vision_feature_layer=-1,
    )
    text = ids(4, 22)
    text[:, 2:18] = 2
    batch = {"input_ids": text, "attention_mask": mask(4, 22, 2), "pixel_values": pixels()}
    seen = by_part(counted(tf.LlavaForConditionalGeneration(config), batch), 2)
    assert seen == {
        "model.vision_tower": {(68, 0)},
        "model.multi_modal_projector": {(64, None)},
        "model.language_model": {(86, 2)},
    }


def test_images_and_text_in_one() -> None:
    """ViLT joins both, and its mask too: 9 tokens, 16 patches and one."""
    batch = {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 3), "pixel_values": pixels()}
    seen = counted(tf.ViltModel(tf.ViltConfig(**TEXT, image_size=32, patch_size=8)), batch)
    assert set(seen.values()) == {(4 * 26 - 3, 3)}


class Visual(tf.PreTrainedModel):
    """An image tower that is handed on patches by position, without a mask."""

    config_class = tf.PreTrainedConfig

    def __init__(self, config: tf.PreTrainedConfig) -> None:
        super().__init__(config)
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, patches: Tensor) -> Tensor:
        y: Tensor = self.ffn(patches)
        return y


class Both(nn.Module):
    """As many patches as tokens, and a projector between the towers; each example of both is a row of one length."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.embed = Visual(tf.PreTrainedConfig()), nn.Embedding(99, 8)
        self.projector = nn.ModuleList(Visual(tf.PreTrainedConfig()).ffn for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        patches: Tensor = self.visual(pixel_values)
        for layer in self.projector:
            patches = patches + layer(patches)
        y: Tensor = self.embed(input_ids) + patches
        return y


def test_as_many_patches_as_tokens() -> None:
    """The tower of images is told by its call; of the projector it cannot be told, whatever the sizes."""
    batch = {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 4), "pixel_values": torch.randn(4, 9, 8)}
    seen = counted(Both(), batch, hard_coded=True)
    assert seen == {"visual.ffn.1": (36, 0), "projector.0.1": (36, None), "projector.1.1": (36, None)}


class Layer(nn.Module):
    """Attention in name alone: what counts is the mask that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = hidden + self.ffn(hidden)
        return y


class Joint(nn.Module):
    """As Chameleon: images are tokens of the text, and its layers lie in the model that is called with both."""

    def __init__(self, additive: bool) -> None:
        super().__init__()
        self.embed, self.text, self.image, self.additive = nn.Embedding(99, 8), Layer(), Layer(), additive

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        length = input_ids.shape[1]
        every = torch.ones(len(input_ids), 1, length, length).tril().bool()
        seen = (attention_mask[:, None, None] != 0) & every
        if self.additive:
            seen, every = (torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min) for m in (seen, every))
        image = self.image(pixel_values, attention_mask=every)
        y: Tensor = self.text(self.embed(input_ids) + image, attention_mask=seen)
        return y


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_layers_that_are_called_with_the_mask_of_the_text(additive: bool, left: bool) -> None:
    """Its keys say whose it is; one of the same size that hides no padding belongs to something else."""
    batch = {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 4, left), "pixel_values": torch.randn(4, 9, 8)}
    seen = counted(Joint(additive), batch, hard_coded=True)
    assert seen == {"text.ffn.1": (32, 4), "image.ffn.1": (36, None)}


@pytest.mark.parametrize("padding", [None, 0, 5])
def test_additive_masks(padding: int | None) -> None:
    """Longformer hands on masks of 0 and large negative numbers, in two dimensions."""
    config = tf.LongformerConfig(**TEXT, attention_window=4, max_position_embeddings=32, pad_token_id=1)
    batch = {"input_ids": ids(4, 12)}
    if padding is not None:
        batch["attention_mask"] = mask(4, 12, padding)
    seen = counted(tf.LongformerModel(config, add_pooling_layer=False), batch)
    assert set(seen.values()) == {(48 - (padding or 0), padding or 0)}


def test_packed_texts_are_kept_apart() -> None:
    """transformers keeps packed texts apart only without a cache, which is how models are trained and measured."""
    batch = {"input_ids": ids(1, 12), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]])}
    means = []
    for more in ({}, {"use_cache": False}):
        torch.manual_seed(0)
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=2)).eval()
        hlg.convert(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8.0)
        means.append([site.mean for site in hlg.calibrate(model, [{**batch, **more}]).sites])
        assert model.config.use_cache is True
    assert means[0] == pytest.approx(means[1], rel=1e-6)


def decoder_batches() -> dict[str, Batch]:
    labels = ids(4, 7)
    labels[0, 4:] = -100
    shifted = torch.cat([torch.ones(4, 1, dtype=torch.long), labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)], 1)
    inputs = shifted.clone()
    inputs[0, 4:] = 0
    return {
        "labels": {"labels": labels},
        "both": {"labels": labels, "decoder_input_ids": shifted},
        "pad tokens": {"decoder_input_ids": inputs},
        "mask": {"decoder_input_ids": ids(4, 7), "decoder_attention_mask": mask(4, 7, 3)},
    }


def bart() -> nn.Module:
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    return tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=99, d_model=32, pad_token_id=0, decoder_start_token_id=1, bos_token_id=1, **sizes)
    )


def pair() -> nn.Module:
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(
        tf.BertConfig(**TEXT), tf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return tf.EncoderDecoderModel(config)


@pytest.mark.parametrize("how", decoder_batches())
@pytest.mark.parametrize("make", [bart, pair])
def test_decoders(make: Callable[[], nn.Module], how: str) -> None:
    """The decoder's padding follows from its mask, the labels, or the pad tokens at the end of its input.

    EncoderDecoderModel makes a mask of its own where it makes the input from labels: there the last token counts, to which
    no label belongs.
    """
    batch = {"input_ids": ids(4, 7), "attention_mask": mask(4, 7, 1), **decoder_batches()[how]}
    seen = counted(make(), batch)
    assert {numbers for name, numbers in seen.items() if "encoder" in name.split(".")[:2]} == {(27, 1)}
    wanted = (26, 2) if make is pair and how == "labels" else (25, 3)
    assert {numbers for name, numbers in seen.items() if "encoder" not in name.split(".")[:2]} == {wanted}


class Own(nn.Module):
    """torch's encoder of one's own: its padding mask is True at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.act, self.down = nn.Embedding(99, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, input_ids: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        x: Tensor = self.embed(input_ids)
        return x + self.down(self.act(self.up(x)))


def test_mask_that_marks_padding() -> None:
    batch = {"input_ids": ids(4, 9), "src_key_padding_mask": mask(4, 9, 4) == 0}
    assert counted(Own(), batch) == {"act": (32, 4)}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


class Experts(nn.Module):
    """A list of experts; tokens that are alike, padding among them, go to one together."""

    def __init__(self, top: int) -> None:
        super().__init__()
        self.router, self.experts, self.top = nn.Linear(16, 3), nn.ModuleList(Expert() for _ in range(3)), top

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        chosen, out = self.router(flat).topk(self.top).indices, torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).any(-1).nonzero()[:, 0]
            if len(rows):
                out[rows] = out[rows] + expert(flat[rows])
        return x + out.reshape(x.shape)


class Mixture(nn.Module):
    def __init__(self, top: int) -> None:
        super().__init__()
        self.embed, self.mixture = nn.Embedding(9, 16), Experts(top)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.mixture(self.embed(input_ids))
        return y


@pytest.mark.parametrize("top", [1, 2])
def test_experts_in_a_list(top: int) -> None:
    """Each expert counts the tokens that the router sends there, and the padding apart."""
    torch.manual_seed(0)
    model = Mixture(top).eval()
    batch = {"input_ids": ids(8, 9) % 9, "attention_mask": mask(8, 9, 5)}
    chosen = model.mixture.router(model.embed(batch["input_ids"])).topk(top).indices
    kept = batch["attention_mask"] != 0
    wanted = {}
    for index in range(3):
        sent = (chosen == index).any(-1)
        if sent.any():
            wanted[f"mixture.experts.{index}.act"] = (int((sent & kept).sum()), int((sent & ~kept).sum()))
    assert len(wanted) > 1
    seen = counted(model, batch)
    assert {name: numbers for name, numbers in seen.items() if sum(n or 0 for n in numbers)} == wanted


def test_chosen_rows() -> None:
    """Rows are found again among all, equal ones in their order; rows that are not all there are not guessed."""
    whole = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    whole[10] = whole[3]
    rows = torch.tensor([1, 3, 10, 30, 49])
    found = chosen_rows(whole[rows], whole)
    assert found is not None
    assert torch.equal(found, rows)
    assert chosen_rows(whole[torch.tensor([1, 3, 30])], whole) is None  # the other of two equal rows is not there
    assert chosen_rows(whole[rows] * 1.0001, whole) is None
    assert chosen_rows(whole[rows].double(), whole) is None


def test_prefix_tuning() -> None:
    """The mask covers the virtual tokens in the cache too; what runs are the tokens after them."""
    peft = pytest.importorskip("peft")
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=2, mlp_bias=True))
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert set(counted(model, {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 4)}).values()) == {(32, 4)}
