import os
os.environ.setdefault('MPLBACKEND', 'agg')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('OMP_NUM_THREADS', '1')

from pathlib import Path
import pytest

@pytest.fixture(scope='session')
def root(): return Path(__file__).resolve().parent.parent
