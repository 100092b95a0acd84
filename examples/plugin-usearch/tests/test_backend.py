from memlayer.testing import BackendConformance


class TestUsearch(BackendConformance):
    backend = "usearch"
    minimum_recall = 0.95


class TestUsearchInFloat32(TestUsearch):
    backend_options = {"storage": "f32"}


class TestUsearchInInt8(TestUsearch):
    backend_options = {"storage": "i8"}
