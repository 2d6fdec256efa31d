# Stages, for recipes to source. A recipe sets PYTHON, its folders R (runs, with R/log) and I (indexes),
# `clock` (when each stage began, in seconds: "data:0 bm25:25 results:216") and `start_over` (the command).

cores=$(getconf _NPROCESSORS_ONLN)

# Ctrl-C reaches every process of the terminal at once. All but this shell ignore it; this one passes it on as
# SIGTERM, on which train.py saves before it leaves, and waits until everyone is gone.
jobs=  # process ids
pass_on() {
  trap '' INT TERM HUP
  [ -z "$jobs" ] || kill -TERM $jobs 2> /dev/null || true
  wait 2> /dev/null || true
}
stopped() {
  pass_on
  printf -- '\n-- stopped after %s; to go on, give the same command again; to start over, first: %s\n' \
    "$(minutes $SECONDS)" "$start_over"
  exit 130
}
trap stopped INT TERM HUP

minutes() { printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); }

# The time to go: what remains of the clock, at this machine's pace since the first stage that had to be run.
# That pace is trusted once it spans 10 seconds of the clock.
began_at= began=
to_go() { # KEY
  case " $clock " in *[[:space:]]"$1":*) ;; *) return ;; esac
  local at=${clock#*"$1":} all=${clock##*:}
  at=${at%%[[:space:]]*}
  if [ -z "$began_at" ]; then began_at=$at began=$SECONDS; fi
  local left=$((all - at)) passed=$((at - began_at))
  if [ $passed -ge 10 ]; then left=$((left * (SECONDS - began) / passed)); fi
  printf ', about %s to go' "$(minutes $((left > 5 ? left : 5)))"
}

# A command's stderr: all of it into the log, and every ten seconds its progress bar to the reader.
progress() { # WHAT LOG
  trap '' INT TERM  # it ends when the command does
  local part due=$((SECONDS + 10))
  while IFS= read -r -d $'\r' part || [ -n "$part" ]; do
    printf '%s\n' "$part" >> "$2"
    part=${part##*$'\n'}
    case $part in
      *%*) [ $SECONDS -lt $due ] || { due=$((SECONDS + 10)); printf '   %s: %s\n' "$1" "$part"; } ;;
    esac
  done
}

# What stands is not made again, and so must have been made with the same settings: with another model, say,
# the table would be the old one's.
settings() { # NAME=VALUE...
  local file=$R/settings
  if [ -e "$file" ] && [ "$(cat "$file")" != "$*" ]; then
    echo "$R was made with $(cat "$file"), not with $*: give another OUT, or first: $start_over" >&2
    exit 2
  fi
  printf '%s\n' "$*" > "$file"
}

# Every stage is one command line and makes one output; one that stands is not made again.
stage() { # KEY OUTPUT WHAT COMMAND...
  local key=$1 output=$2 what=$3 log=$R/log/$1.txt status=0
  shift 3
  if [ -e "$output" ]; then echo "-- have $output"; return; fi
  to_go "$key" > /dev/null  # once outside $( ), where what it remembers would be lost
  printf -- '-- %s (%s gone%s)\n' "$what" "$(minutes $SECONDS)" "$(to_go "$key")"
  # In the background, since bash hears a signal during `wait`, but not during a command.
  "$@" 2> >(progress "$key" "$log") &
  jobs=$!
  wait $jobs || status=$?
  jobs=
  [ $status = 0 ] || failed "$what" "$log" $status
}
failed() { # WHAT LOG STATUS
  # Killed by hand or by Ctrl-C, it has nothing to explain.
  if [ "$3" -lt 128 ]; then
    sleep 0.5  # until progress has written the last line
    [ ! -e "$2" ] || tail -n 20 "$2" >&2
  fi
  echo "stopped at: $1; all of it is in $2" >&2
  exit "$3"
}

# Two functions, half of the cores each: small models do not keep two cores busy with one.
side_by_side() {
  export OMP_NUM_THREADS=$((cores > 3 ? cores / 2 : 1))
  aside "$1" & local first=$!
  aside "$2" & local second=$!
  jobs="$first $second"
  local ok=0
  wait $first || ok=$?
  wait $second || ok=$?
  jobs=
  [ $ok = 0 ] || exit $ok
  unset OMP_NUM_THREADS
}
aside() {
  trap '' INT
  trap 'pass_on; exit 143' TERM
  jobs=
  "$1"
}

# `exec`: the process that `stage` knows is Python itself.
python() { trap '' INT; exec "$PYTHON" -W ignore "$@"; }
