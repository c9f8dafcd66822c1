docs:
	python docs/build.py

.PHONY: docs
