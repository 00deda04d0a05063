package agent

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/serial"
	"github.com/meshca/meshca/rotation"
)

// maxChain bounds what a chain may hold.
const maxChain = 8

// held is an SVID and the term it was received with. It is not changed once it is made.
type held struct {
	svid *x509svid.SVID
	term rotation.Term
	// received is when the term began to run down, by the clocks that outlive the process.
	received instant
	// bearer is whose the token was that it was given for.
	bearer Bearer
}

// newCSR makes a key, P-256 and never used before, and a request that holds its public half and nothing else: the names
// are the CA's to give.
func newCSR() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("no key could be made: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("no CSR could be made: %w", err)
	}
	return key, csr, nil
}

// receive checks what the CA answered before anything rests on it: our key, the ID it says, a chain to a root that is
// trusted, a life that has not ended. The certificate's times are judged by the CA's clock, which remaining tells, for
// ours may be wrong.
func receive(answer *meshcav1.X509SVID, key crypto.Signer, roots x509bundle.Source, now instant) (*held, error) {
	life, remaining := answer.GetLife().AsDuration(), answer.GetRemaining().AsDuration()
	if life <= 0 || remaining <= 0 {
		return nil, fmt.Errorf("the CA answered with an SVID that has ended (%v of %v left)", remaining, life)
	}
	id, err := spiffeid.FromString(answer.GetSpiffeId())
	if err != nil {
		return nil, fmt.Errorf("the CA answered with a bad SPIFFE ID: %w", err)
	}
	chain, err := parseChain(answer.GetChain())
	if err != nil {
		return nil, fmt.Errorf("the CA answered with a bad chain: %w", err)
	}
	svid := &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
	if err := matches(svid); err != nil {
		return nil, fmt.Errorf("the CA answered with a certificate that %w", err)
	}
	term := rotation.Term{Life: life, Left: min(remaining, life), Received: now.wall}
	h := &held{svid: svid, term: term, received: now}
	if err := h.verify(roots, now); err != nil {
		return nil, fmt.Errorf("the CA answered with a chain that does not verify: %w", err)
	}
	return h, nil
}

func parseChain(der [][]byte) ([]*x509.Certificate, error) {
	if len(der) == 0 || len(der) > maxChain {
		return nil, fmt.Errorf("%d certificates", len(der))
	}
	chain := make([]*x509.Certificate, len(der))
	for i, raw := range der {
		c, err := x509.ParseCertificate(raw)
		if err != nil {
			return nil, err
		}
		chain[i] = c
	}
	return chain, nil
}

// matches checks that the leaf is for the key and the ID.
func matches(svid *x509svid.SVID) error {
	leaf := svid.Certificates[0]
	public, ok := svid.PrivateKey.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return errors.New("is for another key")
	}
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return fmt.Errorf("is no SVID: %w", err)
	}
	if id != svid.ID {
		return fmt.Errorf("is for %s and not for %s", id, svid.ID)
	}
	return nil
}

func (h *held) leaf() *x509.Certificate { return h.svid.Certificates[0] }

// issued is the moment of issue by the CA's clock.
func (h *held) issued() time.Time { return h.leaf().NotAfter.Add(-h.term.Life) }

// serial is lower-case hex, as everywhere.
func (h *held) serial() string { return serial.String(h.leaf().SerialNumber) }

// left is what is left of the term. The process's own clock stands still while the machine is suspended.
func (h *held) left(now instant) time.Duration {
	left := h.term.Remaining(now.wall)
	if lived, ok := now.after(h.received); ok {
		left = min(left, h.term.Left-lived)
	}
	return left
}

// verify checks that the chain leads to a root, by the CA's clock of now, as the term tells it.
func (h *held) verify(roots x509bundle.Source, now instant) error {
	_, _, err := x509svid.Verify(h.svid.Certificates, roots, x509svid.WithTime(h.leaf().NotAfter.Add(-h.left(now))))
	return err
}

// datedBack is what certificates are dated back for clocks that differ. What is valid in less is so before it was renewed.
const datedBack = time.Minute

// ahead is how long it takes until the leaf is valid by the CA's clock and by the node's own; 0 where it is so by one of them,
// or the CA's was not heard. Either clock alone may be wrong: what the CA's says that fell back is good for all who have a
// right one, and its successor would end before it. The intermediate came before the leaf, and the CA issues nothing
// under one that is not valid: where both say it, a renewal brings a better one.
func (h *held) ahead(theirs *clock, now instant) time.Duration {
	t, heard := theirs.reads(now)
	if !heard {
		return 0
	}
	if now.wall.After(t) {
		t = now.wall
	}
	return max(0, h.leaf().NotBefore.Sub(t))
}

// soonWithin is within what time that is renewed which has to be at once, each at a place of its own: after an outage in an
// emergency it is all that a fleet holds. Who finds the CA too busy comes again when it says so.
const soonWithin = 5 * time.Second

// soon is soonWithin, or less for what does not live long.
func (h *held) soon() time.Duration { return min(soonWithin, h.term.Life/100) }

// ended reports whether the term has run out.
func (h *held) ended(now instant) bool { return h.left(now) <= 0 }

func (h *held) chain() [][]byte {
	der := make([][]byte, len(h.svid.Certificates))
	for i, c := range h.svid.Certificates {
		der[i] = c.Raw
	}
	return der
}

// certificate is the form of crypto/tls.
func (h *held) certificate() *tls.Certificate {
	return &tls.Certificate{Certificate: h.chain(), PrivateKey: h.svid.PrivateKey, Leaf: h.leaf()}
}
