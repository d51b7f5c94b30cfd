def show(config):
    pass
