from setuptools import setup
setup(name="flux_quant",version="0.1.0",packages=["flux_quant","flux_quant.kernels","flux_quant.converters","flux_quant.benchmarks","flux_quant.benchmarks.tiny_flux"],
 package_dir={"flux_quant.kernels":"kernels","flux_quant.converters":"converters","flux_quant.benchmarks":"benchmarks"})
