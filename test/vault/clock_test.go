package vault_test

import (
	"bytes"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	upstream "github.com/meshca/meshca/ca/upstream/vault"
)

// TestClocksDiffer: a real Vault signs by its clock, and ours is another one. What counts is the difference, so it is the
// CA's side that is set: in a synctest bubble, whose clock is set by sleeping and stands still while anybody calls the
// network. Vault, and the proxy without TLS before it (to a clock that is behind, Vault's certificate of just now is not
// valid yet), are outside of it.
func TestClocksDiffer(t *testing.T) {
	for name, c := range map[string]struct {
		ahead time.Duration // Vault's clock, of ours
		// refused is what is said where nothing can be signed.
		refused string
		// check is what the check says, as an error where nothing can be signed, and logged what the log says.
		check, logged string
	}{
		"10 minutes ahead":  {10 * time.Minute, "ahead of ours. Set the clocks of both machines (NTP)", "ahead of ours: what it signs is not valid yet here, and is refused", ""},
		"3 minutes ahead":   {3 * time.Minute, "", "ahead of ours; from 5m0s on what it signs is not valid yet here", ""},
		"10 minutes behind": {-10 * time.Minute, "", "behind ours: its certificates end that much earlier", "behind ours, and what it signs ends that much earlier: set the clocks of both machines (NTP)"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, shared)
			address := w.wire(t, nil, nil)
			ours := wall(t).Add(-c.ahead)
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(ours))
				w.t = t // what is made here ends here
				var log bytes.Buffer
				config := w.config()
				config.Address, config.CAFile = address, ""
				u, err := upstream.New(config, upstream.Options{Log: slog.New(slog.NewTextHandler(&log, nil)), Observe: w.observe})
				must(t, err)
				defer func() { _ = u.Close() }()
				before := time.Until(wall(t))
				found := u.Check(t.Context())
				l := line(t, u, named(t, u))
				_, err = l.Renew(t.Context())
				st, after := u.Status(), time.Until(wall(t))
				if st.ClockAhead < before-time.Second || st.ClockAhead > after+time.Second {
					t.Errorf("measured %s, and it is %s to %s", st.ClockAhead, before, after)
				}
				if len(found) != 1 || found[0].Warning != (c.refused == "") || !strings.Contains(found[0].Why, c.check) || !strings.Contains(found[0].Do, "NTP") {
					t.Errorf("check: %+v", found)
				}
				if c.refused != "" {
					if err == nil || !strings.Contains(err.Error(), c.refused) || l.Ready() == nil {
						t.Errorf("got %v, want %q", err, c.refused)
					}
					return
				}
				must(t, err)
				must(t, l.Ready())
				got, now := l.Status().Chain[0], time.Now()
				if now.Before(got.NotBefore) || got.NotAfter.Sub(now) < 71*time.Hour || got.NotAfter.Sub(now) > 72*time.Hour+after+time.Second {
					t.Errorf("at %s by our clock there is one that is valid from %s to %s", now, got.NotBefore, got.NotAfter)
				}
				if last := w.calls[len(w.calls)-1]; last.Shortened() != (c.logged != "") || c.logged != "" && !strings.Contains(log.String(), c.logged) {
					t.Errorf("observed %+v, and the log says %q", last, log.String())
				}
			})
		})
	}
}

// wall is the time by the machine's clock, also in a bubble.
func wall(t *testing.T) time.Time {
	t.Helper()
	var now syscall.Timeval
	must(t, syscall.Gettimeofday(&now))
	return time.Unix(now.Unix())
}
