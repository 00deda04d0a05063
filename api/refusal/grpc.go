package refusal

import (
	"context"
	"errors"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// GRPCStatus is the refusal's form on the wire; package status finds it by itself.
func (e *Error) GRPCStatus() *status.Status {
	st := status.New(e.Reason.Code(), e.Detail)
	with, err := st.WithDetails(&errdetails.ErrorInfo{Reason: string(e.Reason), Domain: Domain})
	if err != nil {
		return st
	}
	if e.RetryAfter > 0 {
		if retry, err := with.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)}); err == nil {
			return retry
		}
	}
	return with
}

// From finds the refusal in err: one of ours in its tree, or one that came as a gRPC status of our domain.
// A reason that this build does not know (a newer peer's) is kept as it came.
func From(err error) (*Error, bool) {
	if err == nil {
		return nil, false
	}
	var e *Error
	if errors.As(err, &e) {
		return e, true
	}
	st, ok := status.FromError(err)
	if !ok {
		return nil, false
	}
	found := &Error{Detail: st.Message()}
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == Domain {
				found.Reason = Reason(d.GetReason())
			}
		case *errdetails.RetryInfo:
			found.RetryAfter = d.GetRetryDelay().AsDuration()
		}
	}
	return found, found.Reason != ""
}

// Status turns any error into the status that may leave the process. What is no refusal leaves as Internal without
// its text, which may name things that are not the peer's business; a cancelled or late context keeps its code.
func Status(err error) error {
	if err == nil {
		return nil
	}
	if e, ok := From(err); ok {
		return e.GRPCStatus().Err()
	}
	switch {
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the call was cancelled")
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, "the call ran out of time")
	}
	return New(Internal, "an internal fault: the CA's log has it").After(5 * time.Second).GRPCStatus().Err()
}
