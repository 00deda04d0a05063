package softhsm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/test/softhsm"
)

// TestATokenThatHangs: the library's calls do not return. Whoever asks is told so, /readyz says why, operators are answered, it
// comes back by itself, and the CA can be stopped.
func TestATokenThatHangs(t *testing.T) {
	s := newSite(t)
	library, env := softhsm.Silent(t, s.dir, s.file("silent"))
	s.extra = env
	config, err := os.ReadFile(s.file("ca.yaml"))
	must(t, err)
	text := strings.ReplaceAll(string(config), softhsm.Library(), library)
	text = strings.Replace(text, "ttl: 8s", "ttl: 1h", 1) // the CA's own certificate outlives the silence
	must(t, os.WriteFile(s.file("ca.yaml"), []byte(text), 0o600))
	if out, err := s.runs("root", "create", "--config", s.file("ca.yaml")); err != nil {
		t.Fatalf("root create: %v\n%s", err, out)
	}
	s.start()
	before, _ := s.issued()

	silent := func() { must(t, os.WriteFile(s.file("silent"), nil, 0o600)) }
	silent()
	s.until("a refusal", func() error {
		_, _, err := s.issue()
		if r, ok := refusal.From(err); !ok || r.Reason != refusal.SignerUnavailable || r.RetryAfter == 0 {
			return fmt.Errorf("got %v", err)
		}
		return nil
	})
	s.until("not ready", func() error { return s.ready("it does not answer: a call has been under way for") })
	must(t, s.orders(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		_, err := c.GetAuthorities(ctx, &meshcav1.GetAuthoritiesRequest{})
		return err
	}))
	err = s.orders(func(ctx context.Context, c meshcav1.AuthorityServiceClient) error {
		_, err := c.RotateIntermediate(ctx, &meshcav1.RotateIntermediateRequest{})
		return err
	})
	if refusal.Of(err) != refusal.SignerUnavailable {
		t.Errorf("another intermediate: %v", err)
	}

	must(t, os.Remove(s.file("silent")))
	s.until("ready again", func() error { return s.ready("") })
	if now, _ := s.issued(); !now.Equal(before) {
		t.Error("another intermediate signs, though its key was silent only for a while")
	}

	silent()
	s.until("a call that hangs", func() error {
		if _, _, err := s.issue(); err == nil {
			return errors.New("it is signed")
		}
		return nil
	})
	must(t, s.process.Signal(syscall.SIGTERM))
	select {
	case <-s.process.Done():
	case <-time.After(limit):
		t.Errorf("it does not end:\n%s", s.process.Output())
	}
}
