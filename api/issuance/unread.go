package issuance

import (
	"context"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
)

// description is the service's own, with lines of the audit log for messages that grpc cannot take: it refuses them before
// any interceptor runs. Its answer, RESOURCE_EXHAUSTED or INTERNAL in its own words, has left when its error is seen here.
func (s *Server) description() *grpc.ServiceDesc {
	d := meshcav1.IssuanceService_ServiceDesc
	d.Methods = slices.Clone(d.Methods)
	for i := range d.Methods {
		handle := d.Methods[i].Handler
		d.Methods[i].Handler = func(srv any, ctx context.Context, decode func(any) error, guard grpc.UnaryServerInterceptor) (any, error) {
			return handle(srv, ctx, func(message any) error {
				err := unread(decode(message))
				if _, refused := refusal.From(err); !refused {
					return err
				}
				caller, unknown := callerOf(ctx)
				if unknown != nil {
					return unknown
				}
				return s.accounts.tell(caller, "", err)
			}, guard)
		}
	}
	return &d
}

// unread names in our terms what grpc refused: a message that is larger than it takes, or is no message. The rest, such as a
// call that was given up, stays as it is.
func unread(err error) error {
	switch status.Code(err) {
	case codes.ResourceExhausted:
		return refusal.New(refusal.BatchTooLarge, "the message is larger than the %d MiB that are taken", maxMessage>>20)
	case codes.Internal:
		return refusal.New(refusal.RequestMalformed, "the message cannot be read as what this method takes")
	}
	return err
}
