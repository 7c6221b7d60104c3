"""The section `data`: which data sets, in what shares; every mistake is refused (`test_config.py` goes through this table too)."""

from so3krates_dist.config import load_config

WRONG_DATA = [
    ("data.folders=a", "data.folders (command line) must be a list of texts, e.g. [a,b]; got 'a'."),
    ("data.weights=[a]", "data.weights (command line) must be a list of numbers, e.g. [1,2,3]; got ['a']."),
    ("data.oversized=split", "data.oversized (command line) must be one of refuse, alone; got 'split'."),
    ("data.on_damage=ignore", "data.on_damage (command line) must be one of stop, skip; got 'ignore'."),
    *(
        (f"data.{name}=0", f"data.{name} must be greater than zero; got 0")
        for name in ("temperature", "lanes", "window_blocks", "cache_gb", "connect_timeout", "stall_timeout")
    ),
    *(
        (f"data.{name}=-1", f"data.{name} must be zero or greater; got -1")
        for name in ("shuffle_shards", "cost_per_pair", "max_atoms", "max_pairs", "num_workers", "max_skipped", "retries")
    ),
    ("data.cost_per_atom=0.001", "data.cost_per_atom must be at least 0.01: costs count in hundredths; got 0.001."),
    ("data.temperature=nan", "data.temperature must be a finite number; got nan."),
    ("data.temperature=.inf", "data.temperature must be a finite number; got inf."),
    (
        "data.folder=a data.folders=[b]",
        "data.folders must be empty where data.folder is set; got ['b']. Name each data set once, in",
    ),
    ("data.folders=[a,'']", "data.folders must be a list of names, none empty; got ['a', '']."),
    ("data.folders=[a,[b]]", "data.folders must be a list of names, none empty; got ['a', ['b']]."),
    ("data.folders=[a,b,a]", "data.folders must name each data set once; got ['a', 'b', 'a']."),
    (
        "data.folders=[a,b] data.weights=[1]",
        "data.weights must be one share for each of data.folders (2); got 1. Write them in the order of data.folders.",
    ),
    ("data.weights=[1]", "data.weights must be one share for each of data.folders (0); got 1."),
    (
        "data.folders=[a,b] data.weights=[1.5,-0.5]",
        "data.weights must be finite numbers, none below zero; got [1.5, -0.5]. Change the value.",
    ),
    ("data.folders=[a,b] data.weights=[1,nan]", "data.weights must be finite numbers, none below zero; got [1.0, nan]."),
    ("data.folders=[a,b] data.weights=[1,[0]]", "data.weights must be finite numbers, none below zero; got [1.0, [0]]."),
    (
        "data.folders=[a,b] data.weights=[0.6,0.6]",
        "data.weights must add up to 1; got [0.6, 0.6], in sum 1.2. Divide each by 1.2.",
    ),
    (
        "data.folders=[a,b] data.weights=[0,0]",
        "data.weights must add up to 1; got [0.0, 0.0], in sum 0. Change the values.",
    ),
    (
        "data.folders=[a,b] data.weights=[0.5,0.5] data.temperature=2",
        "data.temperature must be left at 1 with data.weights; got 2.0. Leave out one of them.",
    ),
    ("data.loss_weights=[a]", "data.loss_weights (command line) must be a list of numbers, e.g. [1,2,3]; got ['a']."),
    ("data.loss_weights=[1]", "data.loss_weights must be one factor for each of data.folders (0); got 1."),
    (
        "data.folders=[a,b] data.loss_weights=[1]",
        "data.loss_weights must be one factor for each of data.folders (2); got 1. Write them in the order of data.folders.",
    ),
    *(
        (
            f"data.folders=[a,b] data.loss_weights=[1,{text}]",
            f"data.loss_weights must be finite numbers, none below zero; got [1.0, {value}].",
        )
        for text, value in (("-1", "-1.0"), ("nan", "nan"), (".inf", "inf"), ("[1]", "[1]"))
    ),
    ("data.folders=[a,b] data.loss_weights=[0,0]", "data.loss_weights must not all be zero; got [0.0, 0.0]."),
    *(
        (
            f"data.find_limits=true data.{name}=100",
            f"data.{name} must be 0 with data.find_limits; got 100. Leave out one of them.",
        )
        for name in ("max_atoms", "max_pairs")
    ),
    (
        "data.on_damage=skip",
        "data.max_skipped must be greater than zero with data.on_damage=skip; got 0. Set it to what the run may lose.",
    ),
    ("data.max_skipped=5", "data.max_skipped must be 0 without data.on_damage=skip; got 5. Set data.on_damage=skip."),
]  # fmt: skip


def test_data_sets_are_named_in_one_place_or_in_the_other():
    assert load_config([]).data.sources == ()
    assert load_config(["data.folder=a"]).data.sources == ("a",)
    assert load_config(["data.folders=[a]"]).data.sources == ("a",)
    both = load_config(["data.folders=[b,s3://c/d]", "data.weights=[0.3333333,0.6666667]"]).data
    assert both.sources == ("b", "s3://c/d")
    assert both.weights == (0.3333333, 0.6666667)
    assert load_config(["data.folder=a", "data.loss_weights=[2]"]).data.loss_weights == (2.0,)
