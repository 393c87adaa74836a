from tests.goldens import KERNELS, path, text

for name in KERNELS:
    path(name).write_text(text(name), "utf-8")
