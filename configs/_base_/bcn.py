# What a config needs before it can say BCN, and when it does.
custom_imports = dict(imports=['bcn_mm'])
custom_hooks = [dict(type='SyncEstimatesHook')]
