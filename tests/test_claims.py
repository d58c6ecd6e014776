"The recorded verdicts hold for seeds that neither the notebooks nor the recordings use"
import pytest
from paperbook.core.claims import claims_of, recorded, verify
from paperbook.core.papers import papers

SEEDS = 40, 41, 42

@pytest.mark.parametrize('slug', [p.slug for p in papers if p.state == 'ready'])
def test_claims_hold_for_other_seeds(slug):
    "Every claim of the book whose record says that it takes two seconds a seed or less; the notebooks rerun the others"
    rec = recorded(slug)
    quick = [c.id for c in claims_of(slug) if c.at == 'book' and rec[c.id].seconds <= 2*len(rec[c.id].seeds)]
    run = verify(slug, SEEDS, only=quick)
    assert not run.worse, [(r.claim, r.why) for r in run.worse]
    assert len(quick) > len(claims_of(slug))/2
