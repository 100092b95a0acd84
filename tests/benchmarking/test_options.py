import pytest

from memlayer import ConfigError
from memlayer.benchmarking import BackendSetup, BenchmarkOptions


def test_a_setup_reads_names_and_options_of_every_type() -> None:
    setup = BackendSetup.parse("faiss:index=ivf,nprobe=16,share=0.5,exact=false,size=null")
    assert setup.name == "faiss"
    assert setup.options == {
        "index": "ivf",
        "nprobe": 16,
        "share": 0.5,
        "exact": False,
        "size": None,
    }


@pytest.mark.parametrize("text", ["torch", "faiss:index=ivf,nprobe=16", "mine:a=true,b=1.5"])
def test_a_setup_is_written_as_it_is_read(text: str) -> None:
    assert str(BackendSetup.parse(text)) == text


@pytest.mark.parametrize("text", ["faiss:", "faiss:nprobe", "faiss:=3", "faiss:a=1,a=2", "x:a=1,"])
def test_a_setup_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"backend must be NAME or .*, got '" + text):
        BackendSetup.parse(text)


def test_sizes_are_vectors_and_rising() -> None:
    options = BenchmarkOptions(tokens=(4096, 1024, 4096), chunk_size=8, top_k=64, queries=(9, 1))
    assert options.sizes == (128, 512)
    assert options.k == 8
    assert options.queries == (1, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (1022,)}, "tokens must be multiples of chunk_size=4, got 1022"),
        ({"tokens": ()}, "tokens must be at least one number, got none"),
        ({"tokens": (0,)}, "tokens must be a whole number, at least 1, got 0"),
        ({"queries": (1.5,)}, "queries must be a whole number, at least 1, got 1.5"),
        ({"top_k": 6}, "top_k must be multiples of chunk_size=4, got 6"),
        ({"top_k": 8192}, "top_k must be at most the smallest of tokens, got top_k=8192"),
        ({"rounds": 0}, "rounds must be a whole number, at least 1, got 0"),
        ({"heads": 0}, "heads must be a whole number, at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number, at least 0, got -1"),
        ({"budget": 0}, "budget must be a number of seconds above 0, got 0"),
        ({"budget": float("nan")}, "budget must be a number of seconds above 0, got nan"),
    ],
)
def test_wrong_values_are_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkOptions(**change)
