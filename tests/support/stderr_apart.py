"""Run a script with what it says on stderr in a file: FILE SCRIPT ARGUMENT..."""

import os
import runpy
import sys

file, *sys.argv = sys.argv[1:]
os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), 2)
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name='__main__')
