package pkcs11

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// signsWithin asks for a signature and returns how long that took.
func signsWithin(ctx context.Context, k *Key, d time.Duration) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	began := time.Now()
	digest := sha256.Sum256([]byte("to be signed"))
	_, err = k.SignContext(ctx, rand.Reader, digest[:], crypto.SHA256)
	return time.Since(began), err
}

// inHang runs a test with a key whose token Run looks after.
func inHang(t *testing.T, test func(t *testing.T, l *library, m *Modules, k *Key)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l, m, u := newLibrary(t)
		k, err := m.Make(u)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		go m.Run(ctx)
		defer synctest.Wait()
		defer stop()
		test(t, l, m, k)
	})
}

// silent wants an error of a token that does not answer, which says what to do.
func silent(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, errSilent) || !strings.Contains(err.Error(), "PKCS #11 pkcs11:token=t by /m.so") || len(err.Error()) > 500 {
		t.Errorf("got %v", err)
	}
}

func TestATokenThatHangs(t *testing.T) {
	inHang(t, func(t *testing.T, l *library, m *Modules, k *Key) {
		hang := make(chan struct{})
		l.set(func() { l.hangs = hang })
		took, err := signsWithin(t.Context(), k, 2*time.Second)
		if silent(t, err); took != 2*time.Second || k.Ready() != nil {
			t.Errorf("a caller with two seconds has waited for %s; ready %v", took, k.Ready())
		}
		gone, leave := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, leave)
		if took, err := signsWithin(gone, k, time.Hour); !errors.Is(err, context.Canceled) || took != time.Second {
			t.Errorf("a caller who has left: %v after %s", err, took)
		}
		answers := make(chan error, 3*maxCalls)
		for range cap(answers) {
			go func() {
				took, err := signsWithin(t.Context(), k, time.Hour)
				if took > tooLong {
					err = errors.New("it waited for " + took.String())
				}
				answers <- err
			}()
		}
		for range cap(answers) {
			silent(t, <-answers)
		}
		if l.get(&l.most) != maxCalls {
			t.Errorf("%d calls are in the library, want no more than %d", l.get(&l.most), maxCalls)
		}

		// It counts as silent: nobody waits for it any more, and who looks after keys hears why.
		if err := k.Ready(); err == nil || !strings.Contains(err.Error(), "a call has been under way for 1") || !strings.Contains(err.Error(), "restart the CA") {
			t.Errorf("ready: %v", err)
		}
		if took, err := signsWithin(t.Context(), k, time.Hour); took != 0 {
			t.Errorf("who comes then waits for %s: %v", took, err)
		}
		_, err = m.Make(k.URI().WithKey("other", ""))
		silent(t, err)
		silent(t, m.Probe(k.URI()))
		time.Sleep(time.Minute)
		if l.get(&l.inside) != maxCalls {
			t.Errorf("after a minute %d calls are in the library", l.get(&l.inside))
		}

		l.set(func() { l.hangs = nil })
		close(hang)
		synctest.Wait()
		if err := errors.Join(k.Ready(), signs(k)); err != nil || l.get(&l.inside) != 0 {
			t.Errorf("when it answers: %v, and %d calls are in the library", err, l.get(&l.inside))
		}
	})
}

// One answer is lost for ever, and the token answers: it is used again.
func TestALostAnswer(t *testing.T) {
	inHang(t, func(t *testing.T, l *library, _ *Modules, k *Key) {
		hang := make(chan struct{})
		l.set(func() { l.hangs = hang })
		_, err := signsWithin(t.Context(), k, time.Second)
		silent(t, err)
		l.set(func() { l.hangs = nil })
		time.Sleep(tooLong)
		synctest.Wait()
		time.Sleep(tryAgain) // Run has asked the token
		synctest.Wait()
		if err := k.Ready(); err != nil {
			t.Errorf("ready: %v", err)
		}
		if err := signs(k); err != nil || l.get(&l.inside) != 1 {
			t.Errorf("%v, with %d calls in the library", err, l.get(&l.inside))
		}
		// A session that fails meanwhile cannot be opened anew: the library must not be closed under the call. Nobody waits for
		// that, and it is told for as long as it is so.
		l.set(func() { l.restarts++ })
		_ = signs(k)
		for _, after := range []time.Duration{0, tryAgain, 24 * time.Hour} {
			time.Sleep(after)
			synctest.Wait()
			took, err := signsWithin(t.Context(), k, time.Hour)
			for _, err := range []error{err, k.Ready()} {
				if err == nil || !strings.Contains(err.Error(), "restart the CA") || took != 0 {
					t.Errorf("a session that failed %s ago: %v after %s", after, err, took)
				}
			}
		}
		close(hang)
		synctest.Wait()
		_ = signs(k) // what was lost has found a dead session, too
		if err := signs(k); err != nil {
			t.Errorf("in the end: %v", err)
		}
	})
}

func TestATokenThatHangsAsItIsOpened(t *testing.T) {
	inHang(t, func(t *testing.T, l *library, m *Modules, k *Key) {
		hang := make(chan struct{})
		l.set(func() { l.restarts++; l.opens = hang })
		_ = signs(k) // it ends the session
		began := time.Now()
		silent(t, m.Probe(k.URI()))
		if took := time.Since(began); took != longest {
			t.Errorf("it was waited for for %s", took)
		}
		silent(t, k.Ready())
		if took, err := signsWithin(t.Context(), k, time.Hour); took != 0 {
			t.Errorf("who comes then waits for %s: %v", took, err)
		}
		l.set(func() { l.opens = nil })
		close(hang)
		synctest.Wait()
		if err := errors.Join(signs(k), k.Ready()); err != nil || l.get(&l.open) != 1 {
			t.Errorf("when it is open: %v, %d sessions", err, l.get(&l.open))
		}
	})
}

// The process ends, whatever its tokens do.
func TestTheEndDoesNotWaitForAToken(t *testing.T) {
	inHang(t, func(t *testing.T, l *library, m *Modules, k *Key) {
		hang := make(chan struct{})
		l.set(func() { l.hangs = hang })
		_, err := signsWithin(t.Context(), k, time.Second)
		silent(t, err)
		began := time.Now()
		if err := m.Close(); err == nil || !strings.Contains(err.Error(), "/m.so was not closed") || time.Since(began) != closesWithin {
			t.Errorf("after %s: %v", time.Since(began), err)
		}
		l.set(func() { l.hangs = nil })
		close(hang)
		synctest.Wait()
	})
}
