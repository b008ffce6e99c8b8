"""From labels of a few documents or words to labels for all of them, by word.

One linear head over three kinds of features: hashed n-grams around a word (`ngrams`), a small
transformer that reads both ways and is trained here (`encoder`), or hidden states of the model that
is labelled for (`states`). Words are parts of a text, counted in characters, so that no tokenizer
decides what a label covers. `labeller.fit_labeller` tells the line from rows to a calibrated
labeller, `label_rows` that from there to rows.
"""
