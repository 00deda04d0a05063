package admin

import (
	"context"
	"log/slog"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/timestamppb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
)

const (
	// maxWhy bounds an operator's reason in bytes: it travels in every refusal.
	maxWhy = 200
	// MaxSpread bounds over how long a renewal may be spread; lives are six hours.
	MaxSpread = 24 * time.Hour
)

// DenySVID stops everything new for an identity, and says until when what is out there lasts.
func (s *Server) DenySVID(ctx context.Context, r *meshcav1.DenySVIDRequest) (*meshcav1.DenySVIDResponse, error) {
	id, err := s.parseID(r.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	if server, err := ca.ServerID(s.c.TrustDomain); err == nil && id == server {
		return nil, refusal.New(refusal.RequestMalformed, "%s is the CA itself; to stop it, stop its process", id).On("spiffe_id")
	}
	why := strings.TrimSpace(r.GetWhy())
	if why == "" || len(why) > maxWhy || strings.ContainsFunc(why, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return nil, refusal.New(refusal.RequestMalformed, "the reason must be 1 to %d bytes of text in one line: whoever is refused will read it", maxWhy).On("why")
	}
	by := peerName(ctx)
	denial, err := s.c.Orders.Deny(ctx, ca.Denial{ID: id.String(), Why: why, Since: time.Now(), By: by})
	s.audit(ctx, "svid deny", by, err, slog.String("spiffeID", id.String()), slog.String("why", why))
	if err != nil {
		return nil, err
	}
	answer := &meshcav1.DenySVIDResponse{Denial: encodeDenial(denial), AgentsConnected: s.connected()}
	var last time.Time
	err = s.scan(ctx, false, func(e ca.LedgerEntry) bool {
		if e.ID == denial.ID {
			answer.LiveSvids++
			if e.NotAfter.After(last) {
				last = e.NotAfter
			}
		}
		return true
	})
	if err != nil {
		return nil, refusal.New(refusal.StoreUnavailable, "%s is denied, but the ledger could not be read for what is still out there: %w", id, err)
	}
	answer.LastNotAfter = stamp(last)
	return answer, nil
}

// AllowSVID lifts a denial.
func (s *Server) AllowSVID(ctx context.Context, r *meshcav1.AllowSVIDRequest) (*meshcav1.AllowSVIDResponse, error) {
	id, err := s.parseID(r.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	was, err := s.c.Orders.Allow(ctx, id.String())
	s.audit(ctx, "svid allow", peerName(ctx), err, slog.String("spiffeID", id.String()), slog.Bool("wasDenied", was))
	if err != nil {
		return nil, err
	}
	return &meshcav1.AllowSVIDResponse{WasDenied: was}, nil
}

// ListDenials returns all denials by SPIFFE ID; their number is bounded where they are made.
func (s *Server) ListDenials(context.Context, *meshcav1.ListDenialsRequest) (*meshcav1.ListDenialsResponse, error) {
	standing, _ := s.c.Orders.Get()
	answer := &meshcav1.ListDenialsResponse{}
	for _, id := range standing.DeniedIDs() {
		answer.Denials = append(answer.Denials, encodeDenial(standing.Denials[id]))
	}
	return answer, nil
}

// RenewSVIDs orders the renewal of all that was issued before now, or of one identity's.
func (s *Server) RenewSVIDs(ctx context.Context, r *meshcav1.RenewSVIDsRequest) (*meshcav1.RenewSVIDsResponse, error) {
	now := time.Now()
	order := ca.RenewOrder{IssuedBefore: now, Until: now.Add(s.c.MaxLife)}
	if r.GetSpiffeId() != "" {
		id, err := s.parseID(r.GetSpiffeId())
		if err != nil {
			return nil, err
		}
		order.ID = id.String()
	}
	if spread := r.GetSpread(); spread != nil {
		order.Spread = spread.AsDuration()
		if spread.CheckValid() != nil || order.Spread < 0 || order.Spread > MaxSpread {
			return nil, refusal.New(refusal.RequestMalformed, "a spread must lie between 0 and %s", MaxSpread).On("spread")
		}
	}
	err := s.c.Orders.Renew(ctx, order)
	s.audit(ctx, "svid renew", peerName(ctx), err, slog.String("spiffeID", order.ID), slog.String("spread", order.Spread.String()))
	if err != nil {
		return nil, err
	}
	return &meshcav1.RenewSVIDsResponse{
		Order:           &meshcav1.RenewOrder{SpiffeId: order.ID, IssuedBefore: timestamppb.New(now), Spread: r.GetSpread()},
		AgentsConnected: s.connected(),
	}, nil
}

func (s *Server) connected() uint32 { return uint32(min(max(s.c.Connected(), 0), 1<<31)) }

// audit leaves a line also for what failed: an order that was stored may have failed on its way back.
func (s *Server) audit(ctx context.Context, verb, by string, err error, attrs ...slog.Attr) {
	outcome := "done"
	if err != nil {
		outcome = string(refusal.Of(err))
		attrs = append(attrs, slog.String("message", err.Error()))
	}
	s.c.Audit(ctx, verb, by, append(attrs, slog.String("outcome", outcome))...)
}

// parseID accepts an ID with a path in the CA's trust domain: a denial of anything else would promise what it cannot do.
func (s *Server) parseID(text string) (spiffeid.ID, error) {
	if len(text) > 2048 { // SPIFFE-ID §2.3
		return spiffeid.ID{}, refusal.New(refusal.RequestMalformed, "the SPIFFE ID has %d bytes, at most 2048 are allowed", len(text)).On("spiffe_id")
	}
	id, err := spiffeid.FromString(text)
	switch {
	case err != nil:
		return spiffeid.ID{}, refusal.New(refusal.RequestMalformed, "%.80q is not a SPIFFE ID: %w", text, err).On("spiffe_id")
	case !id.MemberOf(s.c.TrustDomain):
		return spiffeid.ID{}, refusal.New(refusal.RequestMalformed, "%.200s is of another trust domain; this CA issues in %s", id, s.c.TrustDomain).On("spiffe_id")
	case id.Path() == "":
		return spiffeid.ID{}, refusal.New(refusal.RequestMalformed, "%.200s names the trust domain, not an identity in it", id).On("spiffe_id")
	}
	return id, nil
}

func encodeDenial(d ca.Denial) *meshcav1.Denial {
	return &meshcav1.Denial{SpiffeId: d.ID, Why: d.Why, Since: stamp(d.Since), By: d.By}
}
