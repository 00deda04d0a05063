package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/meshca/meshca/rotation"
)

const (
	// ComeBack is how long those are waited for whose streams the end of the run before broke, or the agent ended, while
	// there is a socket that they can come back to. Envoy opens an xDS stream again after 30 s at most
	// (envoy.config.core.v3.GrpcService.EnvoyGrpc.retry_policy, its default), go-spiffe's client after 30 s
	// (workloadapi/backoff.go); the rest is for connecting and for taking what is sent.
	ComeBack = 35 * time.Second
	// settle is how long a stream is still counted in files after it has ended, at least.
	settle = 10 * time.Second
)

// proxies counts the streams by which each workload's peers hold a trust bundle. It does so in files, too: a run that
// follows on a kill finds there how many have to come back before the silence of all can be taken for their consent.
// Those whose streams this run ends are waited for likewise: they come back, and have until then what they had.
//
// Each workload that has such streams has a file, with their number. It is written before the first bundle goes out on a
// stream that makes them more than the file says, and lowered some time after they became fewer. So the thousands that come
// back after a restart cost no write, those that come and go cost none, and no bundle is out that the files do not know of.
// Nothing is synced: the files have to outlive the process, and no peer outlives the machine. They lie in the runtime
// directory, as what was held does, which a stop leaves in its place: see deploy/systemd.
type proxies struct {
	dir string
	log *slog.Logger
	// open is since when the peers at a workload's socket can come in, and false while they cannot. It does not wait, and mu
	// may be held.
	open func(socket string) (since time.Time, is bool)
	// changed is set when others are awaited.
	changed rotation.Current[struct{}]

	mu      sync.Mutex
	all     map[string]*attendance // by the workload's name in the store
	failing bool                   // the last write failed
}

// attendance is the streams of one workload.
type attendance struct {
	socket string
	// open are those of now, peak the most of them since the last look, and kept what the file says.
	open, peak, kept int
	// awaited is how many there were when the run before ended, or before this one ended some; 0 once that many are back.
	awaited int
	// until is when those who are awaited are given up, if the socket has been open for as long: see proxies.late.
	until time.Time
}

func newProxies(dir string, open func(socket string) (time.Time, bool), log *slog.Logger) *proxies {
	return &proxies{dir: dir, open: open, log: log, all: make(map[string]*attendance)}
}

// prepare makes the directory, or makes an existing one private.
func (p *proxies) prepare() error {
	if err := privateDir(p.dir); err != nil {
		return fmt.Errorf("the directory for streams: %w", err)
	}
	return nil
}

// of is the attendance of a workload; p.mu is held.
func (p *proxies) of(socket string) (name string, a *attendance) {
	name = nameOf(Workload{Socket: socket})
	if a = p.all[name]; a == nil {
		a = &attendance{socket: socket}
		p.all[name] = a
	}
	return name, a
}

// await waits for n streams, for as long as they take to come back.
func (a *attendance) await(n int) { a.awaited, a.until = n, time.Now().Add(ComeBack) }

// over ends the waiting.
func (a *attendance) over() { a.awaited, a.until = 0, time.Time{} }

// load takes up what the run before left of these workloads, which are all that still stand.
func (p *proxies) load(workloads []*workload) {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		p.log.Error("which workloads had open streams is unknown: all are waited for", "dir", p.dir, "error", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	stand := make(map[string]bool, len(workloads))
	for _, w := range workloads {
		stand[w.name] = true
		if _, a := p.of(w.Socket); err != nil {
			a.await(1)
		}
	}
	for _, e := range entries {
		a := p.all[e.Name()]
		if !stand[e.Name()] {
			p.write(e.Name(), 0)
			continue
		}
		a.kept = p.read(e.Name())
		a.await(a.kept)
	}
}

// read is what a file says. One that a kill left empty stands for one stream, and so does what cannot be read.
func (p *proxies) read(name string) int {
	data, err := readFile(filepath.Join(p.dir, name), 32)
	if err != nil {
		return 1
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 1
	}
	return max(n, 1)
}

// write has a file say n; 0: there is none. p.mu is held. What fails is told: the next run would wait for too few.
func (p *proxies) write(name string, n int) bool {
	file := filepath.Join(p.dir, name)
	err := os.Remove(file)
	if n > 0 {
		err = os.WriteFile(file, []byte(strconv.Itoa(n)), 0o600)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil && !p.failing {
		p.log.Error("open streams cannot be kept: after a restart a trust bundle may be acknowledged that their peers do not have", "error", err)
	}
	p.failing = err != nil
	return err == nil
}

// entrusted counts a stream whose peer is about to get its first bundle, or came with one.
func (p *proxies) entrusted(socket string) {
	p.mu.Lock()
	name, a := p.of(socket)
	a.open++
	a.peak = max(a.peak, a.open)
	if a.open > a.kept && p.write(name, a.open) {
		a.kept = a.open
	}
	back := a.awaited > 0 && a.open >= a.awaited
	if back {
		a.over()
	}
	p.mu.Unlock()
	if back {
		p.changed.Set(struct{}{})
	}
}

// left counts the end of such a stream. cut: the agent ended it, and its peer is going to come back.
func (p *proxies) left(socket string, cut bool) {
	p.mu.Lock()
	_, a := p.of(socket)
	cut = cut && a.open > 0
	if cut {
		a.await(max(a.awaited, a.open))
	}
	a.open = max(0, a.open-1)
	p.mu.Unlock()
	if cut {
		p.changed.Set(struct{}{})
	}
}

// forget ends the waiting for a workload that has ended: its streams are ended, too.
func (p *proxies) forget(socket string) {
	p.mu.Lock()
	name, _ := p.of(socket)
	p.write(name, 0)
	delete(p.all, name)
	p.mu.Unlock()
	p.changed.Set(struct{}{})
}

// run lowers what files say, and gives up at last those who do not come back, until ctx ends. The streams that end with ctx
// are not lowered any more: the next run is to wait for them.
func (p *proxies) run(ctx context.Context) {
	look := time.NewTicker(settle)
	defer look.Stop()
	late := time.NewTimer(ComeBack)
	defer late.Stop()
	for {
		select {
		case <-look.C:
			p.lower()
		case <-late.C:
			late.Reset(p.giveUp())
		case <-ctx.Done():
			return
		}
	}
}

// lower has files say what was open at most since the last look.
func (p *proxies) lower() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, a := range p.all {
		if a.awaited == 0 && a.peak < a.kept && p.write(name, a.peak) {
			a.kept = a.peak
		}
		if a.peak = a.open; *a == (attendance{socket: a.socket}) {
			delete(p.all, name)
		}
	}
}

// giveUp waits no longer for those whose time is over, and says when the next one's may be.
func (p *proxies) giveUp() (next time.Duration) {
	var lost []string
	next = ComeBack
	now := time.Now()
	p.mu.Lock()
	for _, a := range p.all {
		if a.awaited == 0 {
			continue
		}
		switch late, ever := p.late(a); {
		case !ever:
		case late.After(now):
			next = min(next, late.Sub(now))
		default:
			lost = append(lost, p.lack(a))
			a.over()
		}
	}
	p.mu.Unlock()
	if len(lost) > 0 {
		p.log.Warn("not all streams that were open before the restart, or that the agent ended, have come back; trust bundles wait for them no longer",
			"workloads", len(lost), "first", lost[:min(len(lost), maxLacking)])
		p.changed.Set(struct{}{})
	}
	return next
}

// late is when those who are awaited are given up; ever is false while they cannot come back. p.mu is held.
func (p *proxies) late(a *attendance) (at time.Time, ever bool) {
	since, open := p.open(a.socket)
	if at = since.Add(ComeBack); at.Before(a.until) {
		at = a.until
	}
	return at, open
}

// awaits counts the workloads whose streams have not come back yet; the channel closes when that may have changed.
func (p *proxies) awaits() (n int, changed <-chan struct{}) {
	_, changed = p.changed.Get()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.all {
		if a.awaited > 0 {
			n++
		}
	}
	return n, changed
}

// missing is how many streams of one workload are awaited.
func (p *proxies) missing(socket string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a := p.all[nameOf(Workload{Socket: socket})]; a != nil && a.awaited > 0 {
		return a.awaited - a.open
	}
	return 0
}

// lacking says of each workload that is waited for how many of its streams are not back, and until when at most.
func (p *proxies) lacking() (all []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range p.all {
		if a.awaited > 0 {
			all = append(all, p.lack(a))
		}
	}
	return all
}

// lack says it of one; p.mu is held.
func (p *proxies) lack(a *attendance) string {
	until := "nobody can come to its socket now"
	if late, ever := p.late(a); ever {
		until = "waited for until " + late.UTC().Format(time.RFC3339)
	}
	return fmt.Sprintf("%s: %d of the %d streams that it had before the agent's restart, or before it ended some, have not come back; %s", a.socket, a.awaited-a.open, a.awaited, until)
}
