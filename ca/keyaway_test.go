package ca

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// elsewhere is a key that can be away, or lost.
type elsewhere struct {
	crypto.Signer
	away, lost error
}

func (k *elsewhere) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if k.away != nil {
		return nil, k.away
	}
	return k.Signer.Sign(rand, digest, opts)
}

func (k *elsewhere) Ready() error { return errors.Join(k.away, k.lost) }

// A key that does not answer is a passing refusal, and no mismatch, which would last until somebody looked.
func TestAKeyThatIsAway(t *testing.T) {
	h := newHouse(t, MaxTTL, DefaultIntermediateLife)
	s := *h.line.current.Load()
	key := &elsewhere{Signer: s.key}
	s.key = key
	h.line.current.Store(&s)

	key.away = errors.New("CKR_DEVICE_REMOVED")
	_, err := h.issuer.Issue(t.Context(), workloadRequest(t))
	wantReason(t, err, refusal.SignerUnavailable)
	if !strings.Contains(err.Error(), "CKR_DEVICE_REMOVED") || !refusal.SignerUnavailable.Passing() {
		t.Errorf("got %v", err)
	}
	if r, _ := refusal.From(err); strings.Contains(r.Detail, "CKR") || r.RetryAfter == 0 {
		t.Errorf("callers hear %q, after %s", r.Detail, r.RetryAfter)
	}
	err = h.issuer.Ready()
	wantReason(t, err, refusal.SignerUnavailable)
	if !strings.Contains(err.Error(), "CKR_DEVICE_REMOVED") {
		t.Errorf("ready: %v", err)
	}
	h.line.Mend()
	if len(h.line.Wake()) != 0 {
		t.Error("a key that is away is replaced")
	}

	key.away = nil
	if _, err := h.issuer.Issue(t.Context(), workloadRequest(t)); err != nil || h.issuer.Ready() != nil {
		t.Errorf("when it is back: %v, ready %v", err, h.issuer.Ready())
	}

	// One that is gone for good is replaced by whoever keeps the line.
	key.lost = fmt.Errorf("%w: in the token", ErrKeyLost)
	h.line.Mend()
	if len(h.line.Wake()) != 1 {
		t.Error("a lost key is not replaced")
	}
}

// mute is a key that never answers.
type mute struct{ crypto.Signer }

func (mute) SignContext(ctx context.Context, _ io.Reader, _ []byte, _ crypto.SignerOpts) ([]byte, error) {
	<-ctx.Done()
	return nil, fmt.Errorf("it does not answer: %w", ctx.Err())
}

// Nobody waits for a key beyond his own end: he is told to come back, and who has left is not counted as a fault of the key's.
func TestAKeyThatHangs(t *testing.T) {
	h := newHouse(t, MaxTTL, DefaultIntermediateLife)
	s := *h.line.current.Load()
	s.key = mute{s.key}
	h.line.current.Store(&s)
	patient, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := h.issuer.Issue(patient, workloadRequest(t))
	wantReason(t, err, refusal.SignerUnavailable)
	if r, _ := refusal.From(err); r.RetryAfter == 0 || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	gone, leave := context.WithCancel(t.Context())
	time.AfterFunc(time.Second, leave)
	if _, err := h.issuer.Issue(gone, workloadRequest(t)); !errors.Is(err, context.Canceled) || refusal.Of(err) == refusal.SignerUnavailable {
		t.Errorf("who has left is told %v", err)
	}
	if h.issuer.Ready() != nil {
		t.Error("a key that hangs is taken for one that signs something else")
	}
}
