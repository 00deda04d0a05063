package kubernetes

import (
	"context"
	"crypto"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	jose "github.com/go-jose/go-jose/v4"

	"github.com/meshca/meshca/api/refusal"
)

// scriptedSource publishes what a test says, and counts.
type scriptedSource struct {
	mu    sync.Mutex
	keys  map[string]crypto.PublicKey
	err   error
	slow  time.Duration
	reads atomic.Int64
}

func (s *scriptedSource) period() time.Duration { return 5 * time.Minute }
func (s *scriptedSource) String() string        { return "the test" }

func (s *scriptedSource) publish(err error, ids ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err, s.keys = err, map[string]crypto.PublicKey{}
	for _, id := range ids {
		s.keys[id] = testKeys()["p256"].Public()
	}
}

func (s *scriptedSource) linger(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slow = d
}

func (s *scriptedSource) read(ctx context.Context) ([]byte, string, error) {
	s.reads.Add(1)
	s.mu.Lock()
	slow := s.slow
	s.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil, "", ctx.Err()
	case <-time.After(slow):
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var set jose.JSONWebKeySet
	for id, key := range s.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: key, KeyID: id})
	}
	raw, err := json.Marshal(set)
	return raw, "https://discovered.example", errors.Join(s.err, err)
}

const testCallTimeout = 3 * time.Second

func newTestKeyring(source keySource) *keyring {
	return newKeyring(source, settings{callTimeout: testCallTimeout}, time.Now, slog.New(slog.DiscardHandler), func(Call) {})
}

// started runs the keyring within a synctest bubble. A reading outlives whoever asked for it, by the timeout of a call at
// most: the bubble ends after that, since it may leave no goroutine behind.
func started(t *testing.T, source keySource) *keyring {
	k := newTestKeyring(source)
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); time.Sleep(testCallTimeout); synctest.Wait() })
	go func() { _ = k.run(ctx) }()
	synctest.Wait()
	return k
}

func known(t *testing.T, k *keyring, id string) refusal.Reason {
	t.Helper()
	_, _, err := k.find(t.Context(), id, time.Now())
	return refusal.Of(err)
}

func TestKeysAreReadFromTimeToTime(t *testing.T) {
	testKeys()
	synctest.Test(t, func(t *testing.T) {
		s := &scriptedSource{}
		s.publish(nil, "a", "b")
		k := started(t, s)
		if got := k.current().ids(); !slices.Equal(got, []string{"a", "b"}) || k.current().issuer != "https://discovered.example" {
			t.Fatalf("keys %v of %q", got, k.current().issuer)
		}
		s.publish(nil, "b")
		time.Sleep(6 * time.Minute)
		synctest.Wait()
		if got := k.current().ids(); !slices.Equal(got, []string{"b"}) {
			t.Errorf("a key that is no longer published is still used: %v", got)
		}
	})
}

func TestKeysOutliveTheirSource(t *testing.T) {
	testKeys()
	synctest.Test(t, func(t *testing.T) {
		s := &scriptedSource{}
		s.publish(errors.New("away"))
		k := started(t, s)
		if got := refusal.Of(k.ready()); got != refusal.KeysUnavailable {
			t.Errorf("ready without keys: %s", got)
		}
		s.publish(nil, "a")
		time.Sleep(2 * time.Second) // the first retry comes after about one
		synctest.Wait()
		if err := k.ready(); err != nil {
			t.Errorf("it did not try again: %v", err)
		}
		for name, bad := range map[string]func(){
			"away":  func() { s.publish(errors.New("away")) },
			"empty": func() { s.publish(nil) },
			"slow":  func() { s.publish(nil, "b"); s.linger(time.Hour) },
		} {
			bad()
			time.Sleep(11 * time.Minute)
			synctest.Wait()
			if got := known(t, k, "a"); got != "" {
				t.Errorf("%s: the last good key is gone: %s", name, got)
			}
			if err := k.last.get(); err == nil {
				t.Errorf("%s: nobody is told", name)
			}
		}
		before := s.reads.Load()
		time.Sleep(time.Hour)
		if n := s.reads.Load() - before; n < 60 || n > 400 {
			t.Errorf("%d readings in an hour of failure", n)
		}
	})
}

func TestUnknownKeyIDs(t *testing.T) {
	testKeys()
	synctest.Test(t, func(t *testing.T) {
		s := &scriptedSource{slow: 100 * time.Millisecond}
		s.publish(nil, "a")
		k := started(t, s)
		time.Sleep(10 * time.Second)

		// One reading for all who ask for a new key at once, and all of them have it.
		s.publish(nil, "a", "b")
		before := s.reads.Load()
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				if got := known(t, k, "b"); got != "" {
					t.Errorf("a new key: %s", got)
				}
			})
		}
		wg.Wait()
		if n := s.reads.Load() - before; n != 1 {
			t.Errorf("%d readings for one new key", n)
		}

		// Strangers make up ids for a minute: a bounded number of readings, and a new key is known soon all the same.
		before = s.reads.Load()
		for i := range 600 {
			id := fmt.Sprintf("made-up-%d", i)
			if got := known(t, k, id); got != refusal.TokenKeyUnknown && got != refusal.KeysUnavailable {
				t.Fatalf("%s: %q", id, got)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := s.reads.Load() - before; n > 15 {
			t.Errorf("%d readings in a minute of made-up ids", n)
		}
		s.publish(nil, "a", "b", "c")
		began := time.Now()
		for known(t, k, "c") != "" {
			if got := known(t, k, "c"); got == refusal.TokenKeyUnknown {
				t.Fatal("a key that is new is refused for good")
			}
			time.Sleep(100 * time.Millisecond)
		}
		if took := time.Since(began); took > rereadPause+time.Second {
			t.Errorf("a new key was unknown for %v", took)
		}
	})
}

// A key id that the source does not have is refused for good when the source was read after the token was issued, and
// for now when it was not.
func TestUnknownKeyIsFinalOrNot(t *testing.T) {
	testKeys()
	synctest.Test(t, func(t *testing.T) {
		s := &scriptedSource{}
		s.publish(nil, "a")
		k := started(t, s)
		time.Sleep(time.Second) // too soon for another reading
		_, _, err := k.find(t.Context(), "x", time.Now())
		var refused *refusal.Error
		if !errors.As(err, &refused) || refused.Reason != refusal.KeysUnavailable || refused.RetryAfter <= 0 || refused.RetryAfter > rereadPause {
			t.Errorf("a token that is newer than the keys: %v", err)
		}
		if _, _, err := k.find(t.Context(), "x", time.Now().Add(-time.Hour)); refusal.Of(err) != refusal.TokenKeyUnknown {
			t.Errorf("a token that is older than the keys: %v", err)
		}
		time.Sleep(rereadPause)
		if _, _, err := k.find(t.Context(), "x", time.Now()); refusal.Of(err) != refusal.TokenKeyUnknown {
			t.Errorf("the keys were read for it: %v", err)
		}
		s.publish(errors.New("away"))
		time.Sleep(rereadPause)
		if _, _, err := k.find(t.Context(), "x", time.Now()); refusal.Of(err) != refusal.KeysUnavailable {
			t.Errorf("the keys could not be read: %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, _, err := k.find(ctx, "y", time.Now()); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller that went: %v", err)
		}
	})
}

func TestKeyFileIsReadAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	write := func(id string) {
		t.Helper()
		next := path + ".new"
		text := `{"keys":[` + jwk(t, testKeys()["p256"].Public(), func(k *jose.JSONWebKey) { k.KeyID = id }) + `]}`
		if err := errors.Join(os.WriteFile(next, []byte(text), 0o600), os.Rename(next, path)); err != nil {
			t.Fatal(err)
		}
	}
	write("a")
	synctest.Test(t, func(t *testing.T) {
		k := started(t, fileSource{path})
		if got := k.current().ids(); !slices.Equal(got, []string{"a"}) {
			t.Fatalf("keys %v", got)
		}
		write("b")
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if got := k.current().ids(); !slices.Equal(got, []string{"b"}) {
			t.Errorf("six seconds after the file changed: keys %v", got)
		}
		if err := os.WriteFile(path, []byte("half a fi"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(6 * time.Second)
		synctest.Wait()
		if got := known(t, k, "b"); got != "" {
			t.Errorf("a broken file took the keys away: %s", got)
		}
	})
}

func TestKeysFromURL(t *testing.T) {
	var answer atomic.Pointer[http.HandlerFunc]
	serve := func(h http.HandlerFunc) { answer.Store(&h) }
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*answer.Load())(w, r) }))
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0) // one client here does not trust it
	server.StartTLS()
	t.Cleanup(server.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	good := `{"keys":[` + jwk(t, testKeys()["p256"].Public(), nil) + `]}`
	source := func(caFile string) keySource {
		t.Helper()
		s, err := newURLSource(settings{keys: KeysConfig{URL: server.URL + "/keys", CAFile: caFile}, callTimeout: 2 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		ca      string
		want    string // in the error; empty: it works
	}{
		"good":     {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(good)) }, ca, ""},
		"not ours": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(good)) }, "", "certificate"},
		"500":      {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, ca, "500"},
		"silent":   {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done(); panic(http.ErrAbortHandler) }, ca, "exceeded"},
		"to http": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/keys", http.StatusFound)
		}, ca, "https"},
		"in rings": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/keys", http.StatusFound) }, ca, "fourth"},
		"endless": {func(w http.ResponseWriter, _ *http.Request) {
			for range 2 << 10 {
				_, _ = w.Write([]byte(strings.Repeat(" ", 1<<10)))
			}
		}, ca, "larger"},
		"a web page": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) }, ca, "no JSON Web Key Set"},
	} {
		serve(test.handler)
		k := newTestKeyring(source(test.ca))
		_, err := k.reread(t.Context(), 0)
		switch {
		case test.want == "" && err != nil, test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
	serve(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 3*maxKeySet)) })
	if raw, _, err := source(ca).read(t.Context()); err != nil || len(raw) != maxKeySet+1 {
		t.Errorf("of an answer of 3 MiB it took %d bytes, %v", len(raw), err)
	}
	bad := filepath.Join(t.TempDir(), "bad.pem")
	if err := os.WriteFile(bad, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{bad, filepath.Join(t.TempDir(), "absent")} {
		if _, err := newURLSource(settings{keys: KeysConfig{URL: server.URL, CAFile: file}}); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("caFile %s: got %v, want an error that names it", file, err)
		}
	}
}
