"""Which rows of a site are tokens: each tower and each call by its own mask, counted by hand from the masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from support.counted import TEXT, Batch, counted, ids, mask
from torch import Tensor, nn

import hf_lambda_gelu as hlg


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


def test_prefix_tuning() -> None:
    """The mask covers the virtual tokens in the cache too; what runs are the tokens after them."""
    peft = pytest.importorskip("peft")
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=2, mlp_bias=True))
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert set(counted(model, {"input_ids": ids(4, 9), "attention_mask": mask(4, 9, 4)}).values()) == {(32, 4)}
