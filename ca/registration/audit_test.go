package registration_test

import (
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/test/world"
)

// disk is an audit log on a disk that can be full: then half of a line fits, once, and nothing after it.
type disk struct {
	world.Audit
	mu   sync.Mutex
	full bool
	left int // bytes that still fit
}

func (d *disk) set(full bool, left int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.full, d.left = full, left
}

func (d *disk) Write(p []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.full || len(p) <= d.left {
		d.left -= len(p)
		return d.Audit.Write(p)
	}
	n, _ := d.Audit.Write(p[:d.left])
	d.left = 0
	return n, errors.New("no space left on device")
}

// TestALostLineIsRemembered until a line says so: other lines that get through end nothing.
func TestALostLineIsRemembered(t *testing.T) {
	out := &disk{}
	j := registration.NewJournal(out, registration.NewRing(4), registration.NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	decide := func() {
		j.Refused(registration.EventCall, "grpc", registration.Caller{}, "one", refusal.New(refusal.Overloaded, "busy"))
	}
	unready := func(when, want string) {
		t.Helper()
		if err := j.Ready(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: ready says %v, want %q", when, err, want)
		}
	}
	decide()
	j.Restore()
	if n := len(out.Lines(t)); n != 1 || j.Ready() != nil {
		t.Fatalf("all is well, and there are %d lines; ready says %v", n, j.Ready())
	}
	out.set(true, 20)
	decide()
	j.Admin(t.Context(), "deny", "uid 0")
	unready("with a full disk", "(2 are lost): no space left")
	j.Restore()
	unready("with a disk that is still full", "(2 are lost): no space left")
	out.set(false, 0)
	unready("with room that nobody tried", "no space left")
	decide()
	unready("after a line that got through", "(2 are lost)")
	j.Restore()
	if err := j.Ready(); err != nil {
		t.Errorf("restored, and still: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 4 || !strings.Contains(lines[3], `"msg":"audit-restored","linesLost":2`) {
		t.Errorf("the log is\n%s", out.String())
	}
	for i, line := range lines {
		if whole := strings.HasSuffix(line, "}"); whole == (i == 1) {
			t.Errorf("line %d is %q: only what did not fit may be torn, and it must tear no other line", i, line)
		}
	}
	j.Restore()
	if n := strings.Count(out.String(), "\n"); n != 4 {
		t.Errorf("there are %d lines: a fault that is over was told again", n)
	}
}

// TestLinesDoNotMix: decisions and administrators' verbs write at once.
func TestLinesDoNotMix(t *testing.T) {
	out := &halves{}
	j := registration.NewJournal(out, registration.NewRing(4), registration.NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { j.Admin(t.Context(), "deny", "uid 0") })
		wg.Go(func() {
			j.Refused(registration.EventCall, "grpc", registration.Caller{}, "one", refusal.New(refusal.Overloaded, "busy"))
		})
	}
	wg.Wait()
	if n := len(out.Lines(t)); n != 40 {
		t.Errorf("%d lines of 40", n)
	}
}

// halves takes a line in two pieces, as a slow file may.
type halves struct{ world.Audit }

func (h *halves) Write(p []byte) (int, error) {
	half := len(p) / 2
	n, err := h.Audit.Write(p[:half])
	if err != nil {
		return n, err
	}
	time.Sleep(100 * time.Microsecond)
	m, err := h.Audit.Write(p[half:])
	return n + m, err
}

var _ io.Writer = (*halves)(nil)
