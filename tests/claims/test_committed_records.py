"""The claims that come with jaxherd: records are current and READMEs show them."""

import pytest

from jaxherd.claims import ledger, table

CLAIMS = ledger.discover()


@pytest.mark.parametrize("name", CLAIMS)
def test_record_is_current(name):
    claim = CLAIMS[name]
    record = ledger.read_record(claim)
    assert record is not None, f"run: jaxherd claims {name} --run"
    assert ledger.status(claim, record) != "stale", f"run: jaxherd claims {name} --run"
    for field in ("statement", "paper_figure", "protocol", "metric"):
        assert record[field] == getattr(claim, field)
    assert record["threshold"] == dict(claim.threshold)
    if "figure" in record:
        assert (ledger.record_path(claim).parent / record["figure"]).is_file()


@pytest.mark.parametrize("name", CLAIMS)
def test_verdict_follows_from_the_recorded_numbers(name):
    claim = CLAIMS[name]
    record = ledger.read_record(claim)
    assert record is not None
    assert set(record["results"]) == set(claim.arms)
    results = {
        arm: {int(seed): numbers for seed, numbers in by_seed.items()}
        for arm, by_seed in record["results"].items()
    }
    assert all(set(by_seed) == set(claim.seeds) for by_seed in results.values())
    decision = claim.decide(results, claim.threshold)
    assert (decision.verdict, decision.ours) == (record["verdict"], record["ours"])
    assert list(decision.reasons) == record["reasons"]
    assert record["spread"] == {arm: ledger.spread(by_seed) for arm, by_seed in results.items()}


@pytest.mark.parametrize("paper", sorted({claim.paper for claim in CLAIMS.values()}))
def test_readme_table_is_current(paper):
    changed = table.write_readme(paper, CLAIMS.values(), check=True)
    assert not changed, "run: jaxherd claims --readme"
