"""Show what SMART does, in a minute and without a download: `python -m smartreg demo`.

A small network is pre-trained on seven of the ten handwritten digits of scikit-learn. It is fine-tuned on all ten from
a few labels, plain and with SMART. Then every test image is attacked inside an l_inf ball. At the end NumPy and the
installed backends train side by side, from the same weights, with the same batches and noise.

A backend gives the demo two functions, in `demo.py` of its package: `train(weights, x, y, config, seed)`, which returns
the trained weights, and `run(task)`. All else is computed in NumPy.
"""
