"""What a converted config says beside its model."""

from support.stock_configs import DEEPLAB, RETINA

from bcn_mm.convert import read_config, to_bcn


def test_batch_size():
    cfg = to_bcn(read_config(RETINA), batch_size=1)
    stock = read_config(RETINA)
    assert cfg.train_dataloader.batch_size == 1
    assert cfg.optim_wrapper.optimizer.lr == stock.optim_wrapper.optimizer.lr / 2
    assert cfg.auto_scale_lr.base_batch_size == 8
    assert to_bcn(cfg, batch_size=1).to_dict() == cfg.to_dict()
    back = to_bcn(cfg, batch_size=2)
    assert back.optim_wrapper == stock.optim_wrapper
    poly = to_bcn(read_config(DEEPLAB), batch_size=1, keep_epochs=True)
    assert poly.param_scheduler[0].eta_min == 1e-4 / 2
    assert poly.param_scheduler[0].end == poly.train_cfg.max_iters == 160000
