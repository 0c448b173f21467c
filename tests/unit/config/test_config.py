"""What the configuration accepts, what it refuses and in which words."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from loraserve.config import MIN_CPUS, Config, config_tree, load_config, parse_config
from loraserve.errors import ConfigError

MISTAKES = [
    ('engine.kind = "x"', 'engine.kind: "x"; expected one of emulated, vllm'),
    ("engine.kind = 3", "engine.kind: 3; expected one of emulated, vllm"),
    (
        "engine.max_lora_rank = 7",
        "engine.max_lora_rank: 7; expected auto or one of 1, 8, 16, 32, 64, 128, 256, 320, 512",
    ),
    ("router.port = 99999", "router.port: 99999; expected an integer from 0 to 65535"),
    ("router.port = -1", "router.port: -1; expected an integer from 0 to 65535"),
    ('router.port = "a"', 'router.port: "a"; expected an integer from 0 to 65535'),
    ("router.port = true", "router.port: true; expected an integer from 0 to 65535"),
    ("router.port = 1.5", "router.port: 1.5; expected an integer from 0 to 65535"),
    (
        "router.max_message_bytes = 3_000_000_000",
        "router.max_message_bytes: 3000000000; expected an integer from 1 to 2147483647",
    ),
    ("cluster.replicas = 0", "cluster.replicas: 0; expected an integer from 1 to 1024"),
    ("engine.max_num_seqs = 0", "engine.max_num_seqs: 0; expected an integer of at least 1"),
    ('placement.seed = "x"', 'placement.seed: "x"; expected an integer'),
    ("slo.ttft_ms = 0", "slo.ttft_ms: 0; expected a number above 0 and at most 1e9"),
    ("slo.ttft_ms = nan", "slo.ttft_ms: NaN; expected a number above 0 and at most 1e9"),
    ("slo.ttft_ms = inf", "slo.ttft_ms: Infinity; expected a number above 0 and at most 1e9"),
    (
        "emulated.base_step_ms = -0.5",
        "emulated.base_step_ms: -0.5; expected a number from 0 to 1e18",
    ),
    ("cluster.cpus_per_replica = -1", "cluster.cpus_per_replica: -1; expected a number from 0 to 1e18"),
    ("cluster.cpus_per_replica = 1e-5", "cluster.cpus_per_replica: 1e-05; expected 0 or at least 0.0001"),
    ("model.path = 1", "model.path: 1; expected a string"),
    ("model.path = 1979-05-27", 'model.path: "1979-05-27"; expected a string'),
    ('adapters.allow_urls = ["a", 1]', "adapters.allow_urls[1]: 1; expected a string"),
    ('adapters.allow_urls = "a"', 'adapters.allow_urls: "a"; expected a list, each item a string'),
    ('fabric.transports = ["rdma"]', 'fabric.transports[0]: "rdma"; expected one of tcp, ucx'),
    (
        'fabric.transports = ["tcp", "ucx", "tcp"]',
        'fabric.transports: ["tcp", "ucx", "tcp"]; expected each of them once',
    ),
    (
        'fabric.racks = [["a", "b"], ["b"]]',
        'fabric.racks: [["a", "b"], ["b"]]; expected names of hosts, each of them in one rack',
    ),
    (
        'fabric.racks = [["a", ""]]',
        'fabric.racks: [["a", ""]]; expected names of hosts, each of them in one rack',
    ),
    ("fabric.max_fetches = 65", "fabric.max_fetches: 65; expected an integer from 1 to 64"),
    (
        "fabric.idle_timeout_s = inf",
        "fabric.idle_timeout_s: Infinity; expected a number above 0 and at most 1e9",
    ),
    ("emulated.engine_process = 1", "emulated.engine_process: 1; expected true or false"),
    ("router = 1", "router: 1; expected a table"),
    ("engine.extra = 1", "engine.extra: 1; expected a table"),
    (
        'engine.adapter_slots = "all"',
        'engine.adapter_slots: "all"; expected auto or an integer from 1 to 4096',
    ),
    (
        'cluster.name = "a b"',
        'cluster.name: "a b"; expected 1 to 31 of the characters a-z, 0-9 and -, the first one no -',
    ),
    (
        'cluster.name = "a\\n"',
        'cluster.name: "a\\n"; expected 1 to 31 of the characters a-z, 0-9 and -, the first one no -',
    ),
    (
        "routers.port = 1",
        "routers: unknown key; allowed: adapters, cluster, emulated, engine, fabric, model, placement,"
        " replica, router, slo",
    ),
    ("slo.ttft_s = 1", "slo.ttft_s: unknown key; allowed: tbt_ms, ttft_ms"),
    ('slo."a\\nb" = 1', "slo.'a\\nb': unknown key; allowed: tbt_ms, ttft_ms"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text for text, _ in MISTAKES])
def test_a_mistake_is_refused_in_one_line_with_its_path_and_what_would_be_right(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    assert str(refusal.value) == f"{path}: {message}"


def test_a_long_value_is_cut_short() -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_config({"engine": {"kind": "x" * 10_000}})
    assert len(str(refusal.value)) < 200


def test_a_file_that_is_not_toml_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("a = 1\nb =\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cluster\.toml: not valid TOML: .*line 2"):
        load_config(path)
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match=r"cluster\.toml: not valid TOML: "):
        load_config(path)


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read the configuration: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read the configuration: Is a directory"):
        load_config(tmp_path)


def test_without_a_file_all_is_default() -> None:
    assert load_config(None) == Config()
    assert config_tree(Config())["router"]["port"] == 50051


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("[router]\nport = 1\nrouters = 3\n", encoding="utf-8")
    config = load_config(path, {"router.port": 2, "cluster.name": "mine"})
    assert (config.router.port, config.router.routers, config.cluster.name) == (2, 3, "mine")
    assert path.read_text(encoding="utf-8") == "[router]\nport = 1\nrouters = 3\n"


def test_overrides_are_checked_as_the_file_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the configuration: router\.port: 70000; expected an integer"):
        load_config(None, {"router.port": 70000})
    with pytest.raises(ConfigError, match=r"router\.prot: unknown key; allowed: .*port"):
        load_config(None, {"router.prot": 1})
    path = tmp_path / "cluster.toml"
    path.write_text("router = 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"router: 1; expected a table$"):
        load_config(path, {"router.port": 2})


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Valid values of a configuration key."""
    match kind:
        case inspect.Metadata(type=inner):
            return values(inner)
        case inspect.StructType(fields=fields):
            return st.fixed_dictionaries({}, optional={one.name: values(one.type) for one in fields})
        case inspect.LiteralType(values=allowed):
            return st.sampled_from(allowed)
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case inspect.FloatType(ge=low, gt=above, le=high):
            start = low if above is None else above
            return st.floats(start, high, exclude_min=above is not None)
        case inspect.StrType(pattern=pattern):
            return st.text() if pattern is None else st.from_regex(pattern)
        case inspect.ListType(item_type=item):
            return st.lists(values(item), max_size=3)
        case inspect.DictType():
            leaves = st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False)
            return st.dictionaries(st.text(), leaves | st.lists(leaves, max_size=2), max_size=3)
    raise AssertionError(f"no values for {kind}")


def has_countable_cpus(tree: dict[str, Any]) -> bool:
    cpus = tree.get("cluster", {}).get("cpus_per_replica", 1.0)
    return bool(cpus == 0 or cpus >= MIN_CPUS)


def named_once(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with each transport and each host of its racks named once."""
    fabric = dict(tree.get("fabric", {}))
    if "transports" in fabric:
        fabric["transports"] = list(dict.fromkeys(fabric["transports"]))
    if "racks" in fabric:
        fabric["racks"] = [
            [f"{row}.{column} {host}" for column, host in enumerate(rack)]
            for row, rack in enumerate(fabric["racks"])
        ]
    return {**tree, "fabric": fabric}


@given(values(inspect.type_info(Config)).filter(has_countable_cpus).map(named_once))
def test_a_configuration_survives_the_way_to_plain_values_and_back(tree: dict[str, Any]) -> None:
    config = parse_config(tree)
    plain = config_tree(config)
    assert parse_config(plain) == config
    assert parse_config(json.loads(json.dumps(plain))) == config
    for section, keys in tree.items():
        for key, value in keys.items():
            assert plain[section][key] == value
