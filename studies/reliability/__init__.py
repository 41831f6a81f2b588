"""A campaign against the library: kills, concurrent readers and writers, damaged files, full disks, hostile names, …

python -m studies.reliability                                           # all parts: about 15 minutes on two cores
python -m studies.reliability mutations names --scale 0.1               # a tenth of the attempts of two parts
python -m studies.reliability "mutations/smile.json/17"                 # one attempt, as it is named in the output
python -m studies.reliability --output docs/reliability_results.md      # writes the table

Each attempt runs in a child process with bounded time and memory, and ends in one of three ways:

- right: the result is, bit for bit, one of those that may legitimately come of it;
- a clear error: a `SmileError` with a message of one line;
- other: anything else, e.g. another exception, another model, a process that hangs, a temporary entry that stays.

The random numbers of an attempt depend on the seed and on its name. Times of kills, and what processes do to each
other, differ from run to run.
"""
