package pods

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/meshca/meshca/agent"
	"github.com/meshca/meshca/agent/selinux"
	"github.com/meshca/meshca/api/refusal"
)

const (
	// lookEvery is how often it is looked which pods are gone or have been away for long, and whether the socket is still there.
	lookEvery = 2 * time.Second
	// reopen is how long a socket that cannot be opened is left alone.
	reopen = 5 * time.Second
	// recently is for how long a peer that was sent away is something that wants looking at.
	recently = 10 * time.Minute
	// lastWord is how long connections of a pod that has ended stay open: streams on them hear why. Their descriptors may
	// have been passed on to one that goes on.
	lastWord = 10 * time.Second
	// maxPods bounds the pods of one node: kubelets run 110 by default, and a few hundred where they are told to.
	maxPods = 1000
)

// Peers accepts the connections of one socket.
type Peers interface {
	// Accept waits for the next connection of a process in a pod, and returns it with the pod's UID. Others it sends away by
	// itself. It returns an error once the listener is closed, or cannot go on. It is called by one goroutine, again and
	// again.
	Accept() (conn net.Conn, podUID string, err error)
}

// Invisible is what a refusal of Peers turns on (refusal.Error.Claim) that would meet every peer: the agent's pod does not see
// the node's processes.
const Invisible = "hostPID"

// Config is what a Source is made of.
type Config struct {
	// Socket is the path of the shared socket. What lies beside it, pods see too: its directory should hold nothing else.
	Socket string
	// Attest makes the Peers of a listener; refused is to be told of each peer that is sent away. It must not block.
	Attest func(l *net.UnixListener, refused func(error)) (Peers, error)
	// StateFile remembers the UIDs of the pods that are served, over a restart of the agent.
	StateFile string
	// CleanUp has the source forget, when it ends, the pods that have had no connection open for longer than a proxy
	// takes to come back, and take the socket's directory away where there is no other and no pod has it mounted: see
	// agent.Config.CleanUp.
	CleanUp bool
	// Idle is how long a pod may be without a connection before it is forgotten; 10 minutes where it is 0.
	Idle time.Duration
	// Log gets what happens; slog.Default where it is nil.
	Log *slog.Logger
	// label gives a directory the label that SELinux has for containers; selinux.Label where it is nil.
	label func(path string) error
	// mounted reports whether a pod may have a directory mounted; mounted where it is nil.
	mounted func(dir string) bool
}

// Source is the shared socket. It is used by one agent.
type Source struct {
	config Config
	notes  *rate.Limiter // of lines that peers cause

	mu      sync.Mutex
	served  map[string]*podOf // by UID
	broken  error             // why the socket is not open; nil when it is
	refused error             // the last peer that was sent away, and when
	at      time.Time
	saved   error // of the state file
	// blind is why no peer at all can be told, by the last one that came; nil: it could be.
	blind error
	// since is when last nobody could come in: the socket was opened, or a peer was sent away as everybody is, or may be while
	// none could be told (told) in the first hours since the socket was opened (openedAt).
	since    time.Time
	told     bool
	openedAt time.Time
	// taken is the last time that the socket's place was another's, and when.
	taken   error
	takenAt time.Time
}

// podOf is one pod that is served.
type podOf struct {
	kept *agent.Kept
	seen time.Time // when a connection was last open
	// ended is when it was seen first that the pod has ended; zero: it has not.
	ended time.Time
}

var (
	_ agent.Source   = (*Source)(nil)
	_ agent.Reporter = (*Source)(nil)
	_ agent.Entrance = (*Source)(nil)
)

// New makes a Source; it opens nothing.
func New(c Config) *Source {
	if c.Idle == 0 {
		c.Idle = 10 * time.Minute
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	if c.label == nil {
		c.label = selinux.Label
	}
	if c.mounted == nil {
		c.mounted = mounted
	}
	c.Socket = filepath.Clean(c.Socket)
	return &Source{
		config: c, notes: rate.NewLimiter(rate.Every(12*time.Second), 5), served: map[string]*podOf{},
		broken: refusal.New(refusal.SocketPath, "the socket is not open yet"),
	}
}

// workload is a pod as the agent knows it. Its name is that of the shared socket with the pod's UID.
func (s *Source) workload(uid string) agent.Workload {
	return agent.Workload{Socket: s.config.Socket + "#" + uid, PodUID: uid}
}

// Run serves pods until ctx ends.
func (s *Source) Run(ctx context.Context, a *agent.Agent) error {
	for _, uid := range s.kept() {
		if k := a.Find(s.workload(uid).Socket); k != nil {
			s.served[uid] = &podOf{kept: k, seen: time.Now()}
		}
	}
	for ctx.Err() == nil {
		s.failed(ctx, s.serve(ctx, a))
		wait(ctx, reopen)
	}
	s.leave()
	return nil
}

// failed notes why the socket is not open any more, unless that is the agent's end.
func (s *Source) failed(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken == nil || s.broken.Error() != err.Error() {
		s.config.Log.Error("the shared socket is not open; it is tried again", "socket", s.config.Socket, "error", err)
	}
	s.broken = err
}

// serve keeps the socket open until ctx ends or the socket is gone.
func (s *Source) serve(ctx context.Context, a *agent.Agent) error {
	dir := filepath.Dir(s.config.Socket)
	if err := os.MkdirAll(dir, 0o755); err != nil { // pods mount it
		return err
	}
	if err := s.config.label(dir); err != nil { // before the socket is made, which has its label from it
		return err
	}
	socket, other, err := agent.TakeAt(s.config.Socket, 0o666)
	if other != nil {
		s.robbed(other)
	}
	if err != nil {
		return err
	}
	closed := sync.OnceValue(socket.Close)
	defer closed() //nolint:errcheck // it is closed for good
	peers, err := s.config.Attest(socket.Listener(), s.sentAway)
	if err != nil {
		return err
	}
	s.opened()
	s.config.Log.Info("serving pods at the shared socket", "socket", s.config.Socket)
	accepting := make(chan error, 1)
	go func() { accepting <- s.accept(a, peers) }()
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		select {
		case <-look.C:
			s.look()
			if !socket.Intact() {
				_ = closed()
				<-accepting //nolint:errcheck // it ends because the socket was closed
				return refusal.New(refusal.SocketPath, "the socket was removed or replaced by somebody who has its directory writable: pods must mount it with readOnly: true")
			}
		case err := <-accepting:
			return err
		case <-ctx.Done():
			_ = closed()
			<-accepting //nolint:errcheck // as above
			return ctx.Err()
		}
	}
}

// opened notes that the socket is open.
func (s *Source) opened() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.openedAt = time.Now()
	s.broken, s.told, s.since = nil, false, s.openedAt
}

// OpenSince is since when pods can come in, and false while the socket is not open, or nobody can be told.
func (s *Source) OpenSince() (since time.Time, open bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.entrance()
}

// entrance is OpenSince; s.mu is held.
func (s *Source) entrance() (since time.Time, open bool) {
	return s.since, s.broken == nil && s.blind == nil
}

// accept hands connections over to the agent.
func (s *Source) accept(a *agent.Agent, peers Peers) error {
	for {
		conn, uid, err := peers.Accept()
		if err != nil {
			return err
		}
		s.sees()
		k, err := s.find(a, uid)
		if err == nil {
			err = k.Serve(conn)
		} else {
			_ = conn.Close()
		}
		if err != nil && !errors.Is(err, net.ErrClosed) {
			s.sentAway(err)
		}
	}
}

// find returns the workload of a pod, which is made for its first connection.
func (s *Source) find(a *agent.Agent, uid string) (*agent.Kept, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.served[uid]; p != nil {
		p.seen = time.Now()
		return p.kept, nil
	}
	if len(s.served) >= maxPods {
		return nil, refusal.New(refusal.Overloaded, "the shared socket serves %d pods, as many as it may", len(s.served))
	}
	k, err := a.Add(s.workload(uid))
	if err != nil {
		return nil, err
	}
	s.served[uid] = &podOf{kept: k, seen: time.Now()}
	s.save()
	return k, nil
}

// look ends the workloads of pods that are gone, and of those that nobody has been connected to for long.
func (s *Source) look() { s.forget(s.over(time.Now(), s.config.Idle)) }

// forget ends the workloads of pods that were taken out of the served.
func (s *Source) forget(pods map[string]*podOf) {
	for uid, p := range pods {
		if err := p.kept.Remove(); err != nil {
			s.config.Log.Error("what is kept of a pod cannot be removed", "pod_uid", uid, "error", err)
		}
	}
}

// over takes those out of the served that are over: their pod has ended, or they have had no connection open for so long.
// Who could not come was not away.
func (s *Source) over(now time.Time, idle time.Duration) map[string]*podOf {
	return s.take(func(p *podOf) bool {
		m, _ := p.kept.Materials()
		switch {
		case m.End == nil:
			p.ended = time.Time{}
		case p.ended.IsZero():
			p.ended = now
		}
		if p.kept.Open() > 0 && (m.End == nil || now.Sub(p.ended) < lastWord) { // a new stream on it hears why, and costs the CA nothing
			p.seen = now
			return false
		}
		since, open := s.entrance()
		return m.End != nil || open && now.Sub(p.seen) >= idle && now.Sub(since) >= idle // a pod that is gone does not come back under its UID
	})
}

// take takes those out of the served that are to go.
func (s *Source) take(goes func(*podOf) bool) map[string]*podOf {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := map[string]*podOf{}
	for uid, p := range s.served {
		if goes(p) {
			taken[uid] = p
			delete(s.served, uid)
		}
	}
	if len(taken) > 0 {
		s.save()
	}
	return taken
}

// strange is for how long peers that are sent away may mean that everybody is, as below a wrong control group, and not that
// they are strangers: those must not put off for ever when who does not come is given up. What an absent pod holds has ended
// by then.
const strange = 6 * time.Hour

// sentAway notes a peer that was sent away.
func (s *Source) sentAway(err error) {
	s.mu.Lock()
	s.refused, s.at = err, time.Now()
	if s.blind != nil || !s.told && s.at.Sub(s.openedAt) < strange {
		s.since = s.at
	}
	s.blind = nil
	if e, ok := refusal.From(err); ok && e.Claim == Invisible {
		s.blind = err
	}
	s.mu.Unlock()
	if s.notes.Allow() {
		s.config.Log.Warn("a peer of the shared socket was sent away", "socket", s.config.Socket, "error", err)
	}
}

// sees notes that a peer could be told.
func (s *Source) sees() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blind != nil {
		s.since = time.Now()
	}
	s.blind, s.told = nil, true
}

// robbed notes that something else stood in the socket's place, and was taken away.
func (s *Source) robbed(by error) {
	why := refusal.New(refusal.SocketInUse, "another socket stood in the place of the shared one, and was taken away (%w); pods that connected to it may "+
		"have been served another's roots: find the pod that mounts the directory without readOnly: true", by)
	s.config.Log.Error("the shared socket's place was taken", "socket", s.config.Socket, "error", why)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken, s.takenAt = why, time.Now()
}

// Standing is how the socket is.
func (s *Source) Standing() agent.Standing {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := agent.Standing{Subject: "the shared socket", Well: "pods are served at " + s.config.Socket, NotReady: s.broken}
	if st.NotReady == nil {
		st.NotReady = s.blind
	}
	if s.taken != nil && time.Since(s.takenAt) < recently {
		st.Faults = append(st.Faults, s.taken)
	}
	if s.refused != nil && s.blind == nil && time.Since(s.at) < recently {
		st.Faults = append(st.Faults, s.refused)
	}
	if s.saved != nil {
		st.Faults = append(st.Faults, s.saved)
	}
	return st
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
