"The data sets in the hands of fastai"
import torch
from torch import nn
from paperbook.core.data import load
from paperbook.core.training import learner

def test_a_learner_on_the_books_data_exports_and_loads_again(tmp_path):
    from fastai.basics import load_learner
    import fastai.callback.progress
    learn = learner(load('digits'), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.optim.SGD, lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.export(tmp_path/'digits.pkl')
    again, x = load_learner(tmp_path/'digits.pkl'), load('digits').test[0]
    assert torch.equal(again.model(x), learn.model(x)) and not len(again.dls.train_ds)
