#!/usr/bin/env bash
# A Prefect server, its work pools and its workers on this machine. docs/operations.md is the runbook.
#
#   deploy/cluster.sh up              start what does not run, restart what died
#   deploy/cluster.sh down            end all of it, runs included
#   deploy/cluster.sh status          what runs, and where its logs are
#   deploy/cluster.sh systemd [DIR]   print unit files for the same, or write them into DIR
#   deploy/cluster.sh kubernetes      print the commands that put the stages on Kubernetes
#
#   CLOZELINE_HOME            where state, store and releases lie; by default the current directory
#   CLOZELINE_PORT            the server's port; by default 4200
#   CLOZELINE_SERVER_HOST     the server's address; by default 127.0.0.1. Any that others can reach needs a password:
#   PREFECT_SERVER_API_AUTH_STRING   user:password
#   CLOZELINE_DATABASE_URL    postgresql+asyncpg://user:password@host:port/database, or sqlite+aiosqlite:///path; by default
#                             SQLite in PREFECT_HOME
#   PREFECT_HOME              where Prefect keeps what is its own; by default below CLOZELINE_HOME/.clozeline/cluster
#   CLOZELINE_SILENCE         seconds without heartbeats after which a run is taken for dead; by default 300
#   CUDA_VISIBLE_DEVICES      the GPUs to use; by default all
set -euo pipefail

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CLOZELINE_HOME=$(realpath -m "${CLOZELINE_HOME:-$PWD}")
export CLOZELINE_HOME
STATE=$CLOZELINE_HOME/.clozeline/cluster
LOGS=$STATE/logs
PORT=${CLOZELINE_PORT:-4200}
HOST=${CLOZELINE_SERVER_HOST:-127.0.0.1}
BIN=$PROJECT/.venv/bin
[[ -x $BIN/prefect ]] || BIN=$(dirname "$(command -v prefect || echo /)")
START_SECONDS=120
STOP_SECONDS=15
CPU_LIMIT=4 # runs at once; they wait for stages most of the time

fail() {
  printf 'error: %s\n' "$1" >&2
  if [[ -n ${2:-} ]]; then printf '  fix: %s\n' "$2" >&2; fi
  exit "${3:-1}"
}

# --- processes ---------------------------------------------------------------------------------------------------
# A member's file holds "pid start-time boot", so that a pid that was given to another process is never taken for it.
# Whatever a member starts inherits CLOZELINE_CLUSTER_MEMBER, and is found by it even when its parent is gone: the
# workers of Prefect start each run in a session of its own.

started_at() { # PID -> "ticks since boot, boot"; fails where there is no such process
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  stat=${stat##*) } # the name before it may hold spaces
  read -ra stat <<<"$stat"
  [[ ${stat[0]} != Z ]] || return 1
  printf '%s %s' "${stat[19]}" "$(</proc/sys/kernel/random/boot_id)"
}

pid_of() { # MEMBER -> pid; fails where it does not run
  local pid start
  read -r pid start 2>/dev/null <"$STATE/$1.pid" || return 1
  [[ $(started_at "$pid") == "$start" ]] && printf '%s' "$pid"
}

pid_lines() { # MEMBER
  if pid_of "$1"; then echo; fi
}

members() { # all that were started, the server last
  local file name
  for file in "$STATE"/*.pid; do
    name=$(basename "$file" .pid)
    [[ $name == '*' || $name == server ]] || echo "$name"
  done
  if [[ -e $STATE/server.pid ]]; then echo server; fi
}

processes_of() { # MEMBER -> the pids of the member and of all that it started
  local file
  grep -lzsxF "CLOZELINE_CLUSTER_MEMBER=$STATE:$1" /proc/[0-9]*/environ | while read -r file; do
    file=${file#/proc/}
    if started_at "${file%/environ}" >/dev/null; then echo "${file%/environ}"; fi
  done || true
}

runs_of() { # MEMBER -> the pids of the runs that it started, without what these started in their turn
  local main=- pid stat
  declare -A all=()
  main=$(pid_of "$1") || true
  for pid in $(processes_of "$1"); do all[$pid]=1; done
  for pid in "${!all[@]}"; do
    stat=$(cat "/proc/$pid/stat" 2>/dev/null) || continue
    read -ra stat <<<"${stat##*) }"
    if [[ $pid != "$main" && (${stat[1]} == "$main" || -z ${all[${stat[1]}]:-}) ]]; then echo "$pid"; fi
  done
}

signal() { # SIGNAL [PID...]
  if (($# > 1)); then kill "-$1" "${@:2}" 2>/dev/null || true; fi
}

each() { # FUNCTION [MEMBER...]: what it prints for all of them
  local member
  for member in "${@:2}"; do "$1" "$member" || true; done
}

wait_for_none() { # FUNCTION [MEMBER...]: KILL what it still prints after a while
  local until=$((SECONDS + STOP_SECONDS)) pids
  while mapfile -t pids < <(each "$@") && ((${#pids[@]})); do
    if ((SECONDS >= until)); then signal KILL "${pids[@]}"; fi
    sleep 0.2
  done
}

end() { # [MEMBER...]
  local mains runs
  mapfile -t mains < <(each pid_lines "$@")
  # A worker that is told to stop kills its runs before they can report how they ended, and one that goes on takes
  # the next run: so it is held until its runs are gone.
  signal STOP "${mains[@]}"
  mapfile -t runs < <(each runs_of "$@")
  signal TERM "${runs[@]}"
  wait_for_none runs_of "$@"
  signal TERM "${mains[@]}"
  signal CONT "${mains[@]}"
  wait_for_none processes_of "$@"
}

start() { # MEMBER DIRECTORY COMMAND...; starts it unless it runs
  local member=$1 directory=$2 pid
  shift 2
  if pid_of "$member" >/dev/null; then return; fi
  if [[ -n $(processes_of "$member") ]]; then
    echo "$member died; ending what it left"
    end "$member"
  fi
  # bash lets background jobs ignore SIGINT, by which Prefect's workers stop; the lock must not outlive this script.
  (cd "$directory" && exec env --default-signal=INT,QUIT CLOZELINE_CLUSTER_MEMBER="$STATE:$member" \
    setsid "$@" </dev/null >>"$LOGS/$member.log" 2>&1 9>&-) &
  pid=$!
  printf '%s %s\n' "$pid" "$(started_at "$pid")" >"$STATE/$member.pid"
  echo "started $member (pid $pid)"
}

# --- the server --------------------------------------------------------------------------------------------------

loopback() { [[ $1 == localhost || $1 == 127.* || $1 == ::1 ]]; }

answers() { # PATH -> the HTTP status, 000 where nobody answers
  "$BIN/python" - "$PREFECT_API_URL$1" <<'PYTHON'
import base64, os, sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1])
if password := os.environ.get("PREFECT_API_AUTH_STRING"):
    request.add_header("Authorization", "Basic " + base64.b64encode(password.encode()).decode())
try:
    print(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print("000")
PYTHON
}

# What `environment` sets, whatever the environment held, and may be printed.
OWN=(
  DO_NOT_TRACK PREFECT_API_URL PREFECT_FLOWS_HEARTBEAT_FREQUENCY PREFECT_HOME PREFECT_SERVER_ANALYTICS_ENABLED
  PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS
  PREFECT_SERVER_UI_API_URL PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT PREFECT_WORKER_QUERY_SECONDS
)

environment() {
  local address=$HOST
  case $HOST in
    0.0.0.0) address=127.0.0.1 ;;
    ::) address='[::1]' ;;
    *:*) address="[$HOST]" ;;
  esac
  export PREFECT_API_URL=http://$address:$PORT/api
  export PREFECT_HOME=${PREFECT_HOME:-$STATE/prefect}
  export PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED=true
  export PREFECT_SERVER_UI_API_URL=/api # the browser's way to the server may be another than ours: proxy, tunnel
  export PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT=false
  export PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS=5
  export PREFECT_WORKER_QUERY_SECONDS=2
  export PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30
  if [[ -n ${CLOZELINE_DATABASE_URL:-} ]]; then
    export PREFECT_SERVER_DATABASE_CONNECTION_URL=$CLOZELINE_DATABASE_URL
  fi
  if [[ -n ${PREFECT_SERVER_API_AUTH_STRING:-} ]]; then
    export PREFECT_API_AUTH_STRING=$PREFECT_SERVER_API_AUTH_STRING
  fi
}

check_settings() {
  [[ -x $BIN/prefect ]] || fail "prefect is not installed" "make install" 2
  if ! loopback "$HOST" && [[ -z ${PREFECT_SERVER_API_AUTH_STRING:-} ]]; then
    fail "CLOZELINE_SERVER_HOST=$HOST lets others reach the server, and it has no password" \
      "set PREFECT_SERVER_API_AUTH_STRING=user:password, or leave the server on 127.0.0.1" 2
  fi
  case ${CLOZELINE_DATABASE_URL:-} in
    '' | postgresql+asyncpg://* | sqlite+aiosqlite://*) ;;
    *) fail "CLOZELINE_DATABASE_URL begins neither with postgresql+asyncpg:// nor with sqlite+aiosqlite://" \
      "postgresql+asyncpg://user:password@host:port/database" 2 ;;
  esac
}

start_server() {
  local until=$((SECONDS + START_SECONDS))
  if pid_of server >/dev/null; then
    [[ $(<"$STATE/url") == "$PREFECT_API_URL" ]] ||
      fail "the server runs at $(<"$STATE/url")" "deploy/cluster.sh down" 2
  elif [[ $(answers /health) != 000 ]]; then
    fail "something else answers at $PREFECT_API_URL" "set CLOZELINE_PORT to a free port" 2
  fi
  start server "$STATE" "$BIN/prefect" server start --host "$HOST" --port "$PORT"
  echo "$PREFECT_API_URL" >"$STATE/url"
  until [[ $(answers /health) == 200 ]]; do
    if ! pid_of server >/dev/null || ((SECONDS >= until)); then
      tail -n 20 "$LOGS/server.log" >&2
      fail "the server did not start" "see $LOGS/server.log"
    fi
    sleep 0.5
  done
  [[ $(answers /admin/version) == 200 ]] ||
    fail "the server wants another password" "set PREFECT_SERVER_API_AUTH_STRING to the one that it was started with" 2
}

# --- commands ----------------------------------------------------------------------------------------------------

gpus() { # the GPUs to use, one a line
  if ! command -v nvidia-smi >/dev/null; then return; fi
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | sed '/^$/d'
  else
    nvidia-smi -L | sed -n 's/^GPU \([0-9]*\):.*/\1/p' ||
      fail "nvidia-smi does not tell the GPUs" "mend the driver, or set CUDA_VISIBLE_DEVICES= to use none" 2
  fi
}

worker() { # POOL NAME LIMIT: the command of a worker
  printf '%s\n' "$BIN/prefect" worker start --pool "$1" --name "$(uname -n)-$2" --limit "$3" --type process \
    --install-policy never --no-create-pool-if-not-found
}

up() {
  local command devices=() found pin=CUDA_VISIBLE_DEVICES device
  check_settings
  mkdir -p "$LOGS"
  chmod 700 "$STATE" # logs and the database hold texts
  exec 9>"$STATE/lock"
  flock -w 300 9 || fail "another 'up' or 'down' is at work"
  environment
  found=$(gpus)
  if [[ -n $found ]]; then mapfile -t devices <<<"$found"; fi
  if ((${#devices[@]} == 0)); then
    pin=CLOZELINE_DEVICE devices=(cpu-0 cpu-1)
  fi
  start_server
  "$BIN/python" "$PROJECT/deploy/configure.py" --gpus "${#devices[@]}" --silence "${CLOZELINE_SILENCE:-300}"
  mapfile -t command < <(worker cpu cpu "$CPU_LIMIT")
  start cpu "$CLOZELINE_HOME" "${command[@]}"
  for device in "${devices[@]}"; do
    mapfile -t command < <(worker gpu "gpu-${device#cpu-}" 1)
    start "gpu-${device#cpu-}" "$CLOZELINE_HOME" env "$pin=$device" "${command[@]}"
  done
  # A worker that can't start says so in its log, and ends.
  sleep 3
  status
}

down() {
  local names
  if [[ ! -d $STATE ]]; then return; fi
  exec 9>"$STATE/lock"
  flock -w 300 9 || fail "another 'up' or 'down' is at work"
  mapfile -t names < <(members | grep -vx server)
  # The server goes last: the runs that end here tell it so.
  end "${names[@]}"
  end server
  rm -f "$STATE"/*.pid
}

status() {
  local member pid dead=0 names
  mapfile -t names < <(members)
  if ((${#names[@]} == 0)); then
    echo "nothing runs here ($STATE)"
    return 1
  fi
  for member in "${names[@]}"; do
    if pid=$(pid_of "$member"); then
      printf '%-8s runs, pid %-8s %s\n' "$member" "$pid" "$LOGS/$member.log"
    else
      dead=1
      printf '%-8s DIED               %s\n' "$member" "$LOGS/$member.log"
    fi
  done
  printf 'UI   %s\nAPI  %s\n' "$(sed 's,/api$,,' "$STATE/url")" "$(<"$STATE/url")"
  return "$dead"
}

unit_names=(clozeline-server.service clozeline-cpu-worker.service clozeline-gpu-worker@.service)

unit() { # NAME -> its text
  local description=$1 wants='' environment='' command
  case $1 in
    clozeline-server.service)
      description='Prefect server of Clozeline'
      command="$BIN/prefect server start --host $HOST --port $PORT"
      ;;
    clozeline-cpu-worker.service)
      description='Worker of Clozeline for runs'
      command=$(worker cpu cpu "$CPU_LIMIT" | sed "s/$(uname -n)-/%H-/" | paste -sd' ')
      ;;
    *)
      description='Worker of Clozeline for stages on GPU %i'
      environment='Environment=CUDA_VISIBLE_DEVICES=%i'
      command=$(worker gpu gpu-%i 1 | sed "s/$(uname -n)-/%H-/" | paste -sd' ')
      ;;
  esac
  if [[ $1 != clozeline-server.service ]]; then wants=' clozeline-server.service'; fi
  cat <<UNIT
[Unit]
Description=$description
After=network-online.target$wants
Wants=network-online.target

[Service]
User=clozeline
WorkingDirectory=$CLOZELINE_HOME
EnvironmentFile=/etc/clozeline/environment
${environment:+$environment
}ExecStart=$command
Restart=always
RestartSec=5
TimeoutStopSec=30

[Install]
WantedBy=multi-user.target
UNIT
}

systemd() {
  local name
  check_settings
  unset PREFECT_HOME
  environment
  for name in "${unit_names[@]}"; do
    if [[ -n ${1:-} ]]; then
      unit "$name" >"$1/$name"
    else
      printf '# --- /etc/systemd/system/%s\n' "$name"
      unit "$name"
      echo
    fi
  done
  cat <<TEXT
# --- /etc/clozeline/environment (root:clozeline, mode 640)
CLOZELINE_HOME=$CLOZELINE_HOME
$(for name in "${OWN[@]}"; do echo "$name=${!name}"; done)
# with a password: PREFECT_SERVER_API_AUTH_STRING=user:password and PREFECT_API_AUTH_STRING=user:password
# with PostgreSQL: PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://user:password@host:port/database

# --- then
# systemctl daemon-reload
# systemctl enable --now clozeline-server clozeline-cpu-worker
# systemctl enable --now clozeline-gpu-worker@0 clozeline-gpu-worker@1    # one for each GPU
# once, and after each update: PREFECT_API_URL=$PREFECT_API_URL $BIN/python $PROJECT/deploy/configure.py --gpus 2${CLOZELINE_SILENCE:+ --silence $CLOZELINE_SILENCE}
TEXT
}

kubernetes() {
  cat <<TEXT
# The pool gpu as Kubernetes jobs, one GPU each. The image holds Clozeline and the same Prefect as the server; the
# claim is mounted at /data and holds the store; with CLOZELINE_STORE=s3://bucket/store, take it out of the template.
kubectl create namespace clozeline
kubectl --namespace clozeline create secret generic clozeline --from-literal=PREFECT_API_AUTH_STRING=user:password
pip install prefect-kubernetes
export PREFECT_API_URL=http://SERVER:$PORT/api PREFECT_API_AUTH_STRING=user:password
prefect work-pool create gpu --type kubernetes --base-job-template $PROJECT/deploy/kubernetes/gpu-base-job-template.json
$BIN/python $PROJECT/deploy/configure.py --gpus GPUS-OF-THE-CLUSTER${CLOZELINE_SILENCE:+ --silence $CLOZELINE_SILENCE}
prefect worker start --pool gpu --type kubernetes    # anywhere that kubectl works; no GPU needed
TEXT
}

case ${1:-} in
  up | down | status | kubernetes) "$1" ;;
  systemd) systemd "${2:-}" ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
