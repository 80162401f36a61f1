unset PYTHONPATH KAFNB_HOME
cd /tmp/h; rm -rf walk; s=$(date +%s); git clone -q -b reader /tmp/h/reader walk; cd walk; echo "clone $(( $(date +%s)-s ))"; 
s=$(date +%s); make .venv/ready > /tmp/h/walk_install.log 2>&1; echo "install rc $? $(( $(date +%s)-s ))"
s=$(date +%s); OMP_NUM_THREADS=1 .venv/bin/python -m kafnb figures --only 06 --jobs 1 > /tmp/h/walk_06.log 2>&1; echo "first figures: notebook 06 rc $? $(( $(date +%s)-s ))"
s=$(date +%s); make .venv/book > /tmp/h/walk_book.log 2>&1; echo "book install rc $? $(( $(date +%s)-s ))"
uptime
