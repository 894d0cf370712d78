import io
import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from diffusers.pipelines.skyreels_v2.pipeline_skyreels_v2_diffusion_forcing import prompt_clean
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from transformers import AutoTokenizer, T5Tokenizer, UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from mc_engines.errors import BundleError, EngineError
from mc_export.random_source import RandomSource
from mc_export.t5 import (
    describe_text_encoder,
    text_encoder_components,
    text_encoder_tensors,
)
from mc_runtime.text import (
    TextEncoder,
    Tokenizer,
    clean_prompt,
    encode_prompt,
    relative_position_buckets,
)

TOLERANCE = 1e-4
CORPUS = """a cat walks on the grass, realistic style
the sea at dawn; waves roll in & out
A dog jumps over the fence — 一只猫 \uff21\uff22\uff23 café 3.5%"""
PROMPTS = [
    "",
    "a cat walks",
    "  the sea &amp;amp; \uff21\uff22\u00a0cafÃ© \n",
    "a dog on the grass, " * 30,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer as umT5's: unigram pieces with sentencepiece's normalisation, </s> at the end."""
    folder, model = tmp_path_factory.mktemp("tokenizer"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines() * 5), model_writer=model, vocab_size=90,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=5,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    T5Tokenizer.from_pretrained(folder, extra_ids=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def oracle(folder):
    return AutoTokenizer.from_pretrained(folder)


class ModuleRunner:
    """Runs the module behind a graph; the graph itself is tested beside mc_export."""

    def __init__(self, component):
        self.module, self.output = component.module, component.outputs[0]

    def run(self, inputs, weights=None):
        given, held = ({k: torch.tensor(v) for k, v in x.items()} for x in (inputs, weights))
        with torch.no_grad():
            return {self.output: functional_call(self.module, held, (), given).numpy()}


class Case:
    """A small model at random, and the same one in transformers behind diffusers' pipeline."""

    def __init__(self, tokenizer, oracle, table_dtype=np.float32, **sizes):
        self.config = UMT5Config(vocab_size=96, **sizes).to_dict()
        source = RandomSource(text_encoder_tensors(self.config), torch.float32, seed=1)
        weights = {name: source.load(name) for name in source.names()}
        table = weights["shared.weight"].numpy().astype(table_dtype)
        weights["shared.weight"] = torch.tensor(table.astype(np.float32))
        weights["encoder.embed_tokens.weight"] = weights["shared.weight"]
        model = UMT5EncoderModel(UMT5Config(**self.config)).eval()
        model.load_state_dict(weights)
        self.pipeline = SkyReelsV2DiffusionForcingPipeline(oracle, model, None, None, None)
        layer, norm = text_encoder_components(self.config, source)
        self.calls = []

        def layer_weights(index):
            self.calls.append(index)
            return {name: tensor.numpy() for name, tensor in layer.layers[index]().items()}

        described = describe_text_encoder(self.config)
        self.encoder = TextEncoder(
            tokenizer=tokenizer,
            table=table,
            layer=ModuleRunner(layer),
            norm=ModuleRunner(norm),
            layer_weights=layer_weights,
            norm_weights=lambda: {k: v.numpy() for k, v in norm.layers[0]().items()},
            layers=described["layers"],
            relative_buckets=described["relative_buckets"],
            relative_max_distance=described["relative_max_distance"],
        )

    @torch.no_grad()
    def expected(self, prompt, max_tokens):
        return self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=max_tokens
        )[0].numpy()


SMALL = dict(d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2)


@pytest.fixture(scope="module")
def small(tokenizer, oracle):
    return Case(tokenizer, oracle, **SMALL)


@given(st.text() | st.text("&amp;#x3c<> \t\n\u00a0\x1fÃ©"))
@example("<b>&amp;lt;a&amp;gt;")  # in what looks like HTML ftfy leaves entities alone
def test_cleaning_equals_diffusers(text):
    assert clean_prompt(text) == prompt_clean(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(CORPUS + "</s>"), max_tokens=st.integers(1, 40))
def test_ids_equal_transformers(tokenizer, oracle, text, max_tokens):
    ids, cut = tokenizer.encode(text, max_tokens)
    assert ids == oracle(text, max_length=max_tokens, truncation=True).input_ids
    assert len(ids) + cut == len(oracle(text).input_ids)


def test_a_limit_and_padding_in_the_file_are_not_obeyed(folder, tokenizer, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    limited = Tokenizer.from_folder(tmp_path)
    for text in ("a cat", CORPUS):
        assert limited.encode(text, 512) == tokenizer.encode(text, 512)


def transformers_buckets(tokens, buckets, max_distance):
    attention = UMT5Attention(
        UMT5Config(
            relative_attention_num_buckets=buckets, relative_attention_max_distance=max_distance
        )
    )
    offset = torch.arange(tokens) - torch.arange(tokens)[:, None]
    return attention._relative_position_bucket(offset).numpy()


def test_buckets_of_umt5_equal_transformers():
    got = relative_position_buckets(512, 32, 128)
    assert got.dtype == np.int32
    assert np.array_equal(got, transformers_buckets(512, 32, 128))


@settings(deadline=None)
@given(
    tokens=st.integers(1, 80),
    buckets=st.sampled_from([4, 6, 8, 16, 32, 64]),
    max_distance=st.integers(20, 200),
)
def test_buckets_of_other_sizes_equal_transformers(tokens, buckets, max_distance):
    got = relative_position_buckets(tokens, buckets, max_distance)
    assert np.array_equal(got, transformers_buckets(tokens, buckets, max_distance))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("max_tokens", [24, 512])
def test_embedding_equals_diffusers(small, prompt, max_tokens):
    got = encode_prompt(prompt, small.encoder, max_tokens).embedding
    expected = small.expected(prompt, max_tokens)
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE
    assert np.array_equal(got == 0, expected == 0)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_16_bit_table_gives_the_embedding_of_its_values(tokenizer, oracle, dtype):
    case = Case(tokenizer, oracle, table_dtype=dtype, **SMALL)
    got = encode_prompt(PROMPTS[1], case.encoder).embedding
    assert np.abs(got - case.expected(PROMPTS[1], 512)).max() <= TOLERANCE


@settings(max_examples=10, deadline=None)
@given(
    d_model=st.integers(4, 40),
    d_kv=st.integers(1, 16),
    num_heads=st.integers(1, 5),
    d_ff=st.integers(4, 60),
    num_layers=st.integers(1, 4),
    relative_attention_num_buckets=st.sampled_from([4, 8, 32]),
    relative_attention_max_distance=st.sampled_from([16, 50, 128]),
    layer_norm_epsilon=st.sampled_from([1e-6, 1e-3]),
)
def test_embedding_of_random_models_equals_diffusers(tokenizer, oracle, **sizes):
    case = Case(tokenizer, oracle, **sizes)
    for prompt in PROMPTS[1::2]:
        got = encode_prompt(prompt, case.encoder, 64).embedding
        assert np.abs(got - case.expected(prompt, 64)).max() <= TOLERANCE


def test_the_result_says_what_was_cut(small, oracle):
    total = len(oracle(prompt_clean(PROMPTS[3])).input_ids)
    encoded = encode_prompt(PROMPTS[3], small.encoder, 20)
    assert (encoded.tokens, encoded.cut) == (20, total - 20)
    fitting = encode_prompt(PROMPTS[3], small.encoder, total)
    assert (fitting.tokens, fitting.cut) == (total, 0)


def test_each_layers_weights_are_mapped_once_and_in_order(small):
    small.calls.clear()
    encode_prompt("a cat", small.encoder)
    assert small.calls == [0, 1]


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(BundleError) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/tokenizer.json: expected a tokenizer of the tokenizers library, got: "
        "No such file or directory (os error 2). "
        "Export the bundle again from a checkpoint with tokenizer/tokenizer.json."
    )


def test_a_damaged_tokenizer_is_refused(folder, tmp_path):
    half = (folder / "tokenizer.json").read_bytes()[:500]
    (tmp_path / "tokenizer.json").write_bytes(half)
    with pytest.raises(BundleError, match=r"tokenizer.json: expected a tokenizer .* got: EOF"):
        Tokenizer.from_folder(tmp_path)


def test_too_few_tokens_are_refused(tokenizer):
    with pytest.raises(ValueError) as error:
        tokenizer.encode("a cat", 0)
    assert str(error.value) == (
        "max_tokens: expected at least 1, got 0. Leave it at the model's 512."
    )


@pytest.mark.parametrize(("buckets", "max_distance"), [(3, 128), (32, 8)])
def test_impossible_buckets_are_refused(buckets, max_distance):
    with pytest.raises(ValueError) as error:
        relative_position_buckets(5, buckets, max_distance)
    assert str(error.value) == (
        "relative_position_buckets: expected buckets >= 4 and max_distance > buckets // 4, "
        f"got {buckets} and {max_distance}. Take both from the bundle's manifest."
    )


def test_a_tokenizer_of_another_model_is_refused(small):
    encoder = replace(small.encoder, table=small.encoder.table[:2])
    ids, _ = encoder.tokenizer.encode("a cat", 512)
    with pytest.raises(BundleError) as error:
        encode_prompt("a cat", encoder)
    assert str(error.value) == (
        f"tokenizer: expected ids below 2, got {max(ids)}. "
        "Export the bundle again with the tokenizer that belongs to the text encoder."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_name_the_layer(small, value):
    def broken(index):
        weights = small.encoder.layer_weights(index)
        return weights | {"out": weights["out"] * (value if index == 1 else 1)}

    with pytest.raises(EngineError) as error:
        encode_prompt("a cat", replace(small.encoder, layer_weights=broken))
    assert str(error.value) == (
        "text_layer 1: expected finite values, got NaN or infinity. "
        "Check the weights with mc-inspect --verify."
    )


def test_a_broken_last_norm_is_named(small):
    broken = replace(small.encoder, norm_weights=lambda: {"weight": np.full(32, np.nan, "f4")})
    with pytest.raises(EngineError, match="text_norm: expected finite values"):
        encode_prompt("a cat", broken)
