package kubesigner

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
)

// faulty is a registration authority that panics with what nobody is to read.
type faulty struct{ *registration.Authority }

func (faulty) Issue(context.Context, *registration.Admitted, registration.Request) (ca.SVID, error) {
	panic("a-token-in-a-panic")
}

// logBook is a log that is read while it is written.
type logBook struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBook) Write(p []byte) (int, error) { l.mu.Lock(); defer l.mu.Unlock(); return l.b.Write(p) }
func (l *logBook) String() string              { l.mu.Lock(); defer l.mu.Unlock(); return l.b.String() }

// A fault of ours costs a try of one request, is answered with nothing, and tells the log where it was, not what it held.
func TestAPanicIsOneTrysTrouble(t *testing.T) {
	b, log := newBench(t, "v1beta1"), &logBook{}
	d := b.signer.doors[0]
	d.o.Registration, d.o.Log = faulty{b.RA}, slog.New(slog.NewTextHandler(log, nil))
	b.run()
	b.ask("one")
	b.await(func() error {
		if !strings.Contains(log.String(), "answering a request panicked") {
			return fmt.Errorf("the log has %s", log)
		}
		return nil
	})
	if text := log.String(); strings.Contains(text, "a-token-in-a-panic") || !strings.Contains(text, "panic_test.go") {
		t.Errorf("the log has %s", text)
	}
	if kind, _ := b.condition("one"); kind != "" {
		t.Errorf("it is %s", kind)
	}
}
