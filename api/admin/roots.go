package admin

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"log/slog"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// Bounds of one TrustRoot: a bundle travels to every agent and proxy.
const (
	maxRootsPEM = 256 << 10
	maxNewRoots = 16
)

// TrustRoot takes roots into the trust bundle.
func (s *Server) TrustRoot(ctx context.Context, r *meshcav1.TrustRootRequest) (*meshcav1.TrustRootResponse, error) {
	roots, err := parseRoots(r.GetPem())
	if err != nil {
		return nil, err
	}
	var subjects []string
	for _, c := range roots {
		subjects = append(subjects, c.Subject.String())
	}
	added, err := s.c.Roots.TrustRoots(ctx, roots)
	s.audit(ctx, "ca root import", peerName(ctx), err, slog.Any("added", added), slog.Any("subjects", subjects))
	if err != nil {
		return nil, err
	}
	return &meshcav1.TrustRootResponse{BundleSequence: s.sequence(), Added: added}, nil
}

// parseRoots reads PEM certificates. Text around them is what openssl writes; anything else in PEM was not meant to come
// here, and what looks like PEM and is none was cut off.
func parseRoots(data []byte) ([]*x509.Certificate, error) {
	malformed := func(format string, args ...any) error {
		return refusal.New(refusal.RequestMalformed, format, args...).On("pem")
	}
	if len(data) > maxRootsPEM {
		return nil, malformed("%d bytes of certificates, at most %d are taken", len(data), maxRootsPEM)
	}
	var roots []*x509.Certificate
	begun := bytes.Count(data, []byte("-----BEGIN "))
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if begun--; block.Type != "CERTIFICATE" {
			return nil, malformed("a %.40q among the certificates: send certificates alone", block.Type)
		}
		if len(roots) == maxNewRoots {
			return nil, malformed("more than %d certificates", maxNewRoots)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, malformed("certificate %d cannot be read: %w", len(roots)+1, err)
		}
		roots = append(roots, c)
	}
	switch {
	case begun != 0:
		return nil, malformed("a certificate in it is cut off, or damaged")
	case len(roots) == 0:
		return nil, malformed("there is no PEM certificate in it; of a DER file `openssl x509 -inform DER -in FILE` makes one")
	}
	return roots, nil
}

// RemoveRoot takes a root out of the trust bundle.
func (s *Server) RemoveRoot(ctx context.Context, r *meshcav1.RemoveRootRequest) (*meshcav1.RemoveRootResponse, error) {
	if len(r.GetId()) > maxWhy {
		return nil, refusal.New(refusal.RequestMalformed, "a root's ID of %d bytes: it is the SHA-256 of its certificate, in hex", len(r.GetId())).On("id")
	}
	err := s.c.Roots.RemoveRoot(ctx, r.GetId())
	s.audit(ctx, "ca root remove", peerName(ctx), err, slog.String("id", r.GetId()))
	if err != nil {
		return nil, err
	}
	return &meshcav1.RemoveRootResponse{BundleSequence: s.sequence()}, nil
}

// rollout is the last one; nil before the first.
func (s *Server) rollout() *meshcav1.RolloutStatus {
	standing := s.c.Roots.Standing()
	if standing.Rollout.Step == "" {
		return nil
	}
	return encodeStanding(standing)
}
