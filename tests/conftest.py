"""Shared test material: outside data when it is there, a toy world, small autoencoders built from configs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.spec import LatentSpec
from halfstep.store import Manifest
from tests.support.networks import tiny_autoencoder, word_tokenizer

OUTSIDE_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure() -> None:
    """Workers that share the cores have a thread each, and so have the processes that they start."""
    if _WORKER:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def outside_data() -> Path:
    """Real weights and media that are not part of the repository."""
    if not OUTSIDE_DATA.is_dir():
        pytest.skip(f"{OUTSIDE_DATA} is not there")
    return OUTSIDE_DATA


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is measured or compiled once is there for all workers, and nothing that another run left is."""
    root = tmp_path_factory.getbasetemp()
    cache = (root.parent if _WORKER else root) / "cache"
    os.environ["XDG_CACHE_HOME"] = str(cache)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Whatever ran before, a test that draws without a seed draws the same."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads_stay() -> Iterator[None]:
    """Whoever changes the number of threads for a while gives the caller's back."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three walks of ten pictures; not to be changed, copy it."""
    root = tmp_path_factory.mktemp("toy") / "world"
    write_toy_world(root, walks=3, frames=10, size=(80, 60), seed=7)
    return root


@pytest.fixture(scope="session")
def latents(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the toy world's 30 frames in three walks, fp32 [16, 4, 4]; not to be changed, copy it."""
    output = tmp_path_factory.mktemp("latents") / "store"
    encode([SourceConfig(path=toy_world)], EncodeOptions(output, size=(32, 32), precision="fp32", storage="fp32"))
    return output


@pytest.fixture(scope="session")
def small_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved AutoencoderKL with random weights: 4 channels, factor 2."""
    folder = tmp_path_factory.mktemp("vae")
    tiny_autoencoder((16, 32), scaling_factor=0.18215).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved AutoencoderKLWan with random weights: 16 channels, factor 8, time by 4."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan")
    AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_wan_pipeline(tmp_path_factory: pytest.TempPathFactory, small_wan: Path) -> Path:
    """A saved WanPipeline, text to video, with random weights and a tokenizer of a few words."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "green", "car", "cat", "house", "worst", "quality"]
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    folder = tmp_path_factory.mktemp("wan_pipeline")
    WanPipeline(
        tokenizer=word_tokenizer(words, pad_token="<pad>", eos_token="</s>"),
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=len(words), **sizes)),
        vae=AutoencoderKLWan.from_pretrained(small_wan),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=32,
            ffn_dim=48,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def manifest() -> Manifest:
    """A store of fp16 latents with 2 channels."""
    return Manifest(LatentSpec("test", 2, 8, scale=(0.5,), shift=(1.0,)), "fp16")
