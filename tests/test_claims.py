"The recorded verdicts hold for seeds that neither the notebooks nor the recordings use"
import pytest
from paperbook.core.claims import claims_of, recorded, verify
from paperbook.core.papers import papers

SEEDS = 40, 41, 42

@pytest.mark.parametrize('slug', [p.slug for p in papers if p.state == 'ready'])
def test_claims_hold_for_other_seeds(slug):
    "The cheaper two thirds of a paper's claims; the notebooks rerun all of them with seeds of their own"
    rec = recorded(slug)
    cost = lambda c: rec[c.id].seconds/len(rec[c.id].seeds)
    book = sorted((c for c in claims_of(slug) if c.at == 'book'), key=cost)
    run = verify(slug, SEEDS, only=[c.id for c in book[:-(-2*len(book)//3)]])
    assert not run.worse, [(r.claim, r.why) for r in run.worse]
